"""An answer that is JSON of a given shape, whatever the model would like: python samples/constrained.py BUNDLE"""

import json
import sys

import shoal

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 1000, "maximum": 50_000_000},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
with shoal.load(sys.argv[1], context=512) as model:
    answer = model.generate("Describe Paris in JSON.", max_tokens=80, constraint=model.constrain(json_schema=schema))
    print(json.loads(answer.finish()))
