import pytest

from shoal.device_agents.links import Address
from shoal.runtime.errors import UsageError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("edge.local:4800", Address("tcp", host="edge.local", port=4800)),
        ("edge.local", Address("tcp", host="edge.local")),
        ("tcp:10.0.0.2:5", Address("tcp", host="10.0.0.2", port=5)),
        ("[::1]:4707", Address("tcp", host="::1")),
        ("[fe80::1%eth0]", Address("tcp", host="fe80::1%eth0")),
        (":9", Address("tcp", port=9)),
        ("serial:/dev/ttyUSB0", Address("serial", device="/dev/ttyUSB0", baud=115_200)),
        ("serial:/dev/ttyUSB0?baud=921600", Address("serial", device="/dev/ttyUSB0", baud=921_600)),
        ("serial:/dev/ttyS1?flow=rtscts", Address("serial", device="/dev/ttyS1", baud=115_200, flow="rtscts")),
        ("serial:/dev/ttyACM0", Address("serial", device="/dev/ttyACM0")),
        ("serial:COM3", Address("serial", device="COM3", baud=115_200)),
        ("serial:socket://10.0.0.3:2000", Address("serial", device="socket://10.0.0.3:2000")),
        ("serial:socket://h:2?baud=9600", Address("serial", device="socket://h:2", baud=9600)),
        ("serial:rfc2217://h:2000", Address("serial", device="rfc2217://h:2000", baud=115_200)),
    ],
)
def test_what_a_person_writes(text, expected):
    address = Address.parse(text)
    assert address == expected
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "::1:4707",
        "4707",
        "tcp:4707",
        "host:",
        "host:65536",
        "host:99999999999999999999",
        "host:-1",
        "ho st:1",
        "host:1/path",
        "http://host",
        "h\nost",
        "x" * 501,
        "[::1",
        "serial:",
        "serial:?baud=9600",
        "serial:/dev/ttyUSB0?baud=fast",
        "serial:/dev/ttyUSB0?baud=1",
        "serial:/dev/ttyUSB0?baud=999999999",
        "serial:/dev/ttyUSB0?parity=e",
        "serial:/dev/ttyUSB0?flow=xonxoff",
        "serial:loop://",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(UsageError):
        Address.parse(text)


def test_names_and_rates_are_for_people_and_pacing():
    assert Address.parse("10.0.0.2").name == "tcp 10.0.0.2:4707"
    assert Address.parse("serial:/dev/ttyUSB0").name == "serial /dev/ttyUSB0 at 115200 baud"
    assert Address.parse("serial:/dev/ttyUSB0").rate == 11_520
    assert Address.parse("serial:/dev/ttyACM0").rate is None
