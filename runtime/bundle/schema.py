"""FlatBuffers accessors for schema.fbs, in the shape that `flatc --python` gives them, without what nobody calls.

They trust the bytes they are given and follow any offset in them: `verify.structure` has to pass first.
"""

from flatbuffers import encode, number_types, packer, table
from flatbuffers.builder import Builder


class _Table:
    __slots__ = ("_tab",)

    def Init(self, buf, pos):
        self._tab = table.Table(buf, pos)

    def _string(self, slot):
        offset = self._tab.Offset(slot)
        return self._tab.String(offset + self._tab.Pos) if offset else None

    def _scalar(self, slot, flags):
        offset = self._tab.Offset(slot)
        return self._tab.Get(flags, offset + self._tab.Pos) if offset else flags.py_type(0)

    def _length(self, slot):
        offset = self._tab.Offset(slot)
        return self._tab.VectorLen(offset) if offset else 0

    def _element(self, slot, j, item):
        start = self._tab.Vector(self._tab.Offset(slot))
        item.Init(self._tab.Bytes, self._tab.Indirect(start + 4 * j))
        return item


class Section(_Table):
    def Kind(self):
        return self._string(4)

    def Name(self):
        return self._string(6)

    def Offset(self):
        return self._scalar(8, number_types.Uint64Flags)

    def Length(self):
        return self._scalar(10, number_types.Uint64Flags)

    def Alignment(self):
        return self._scalar(12, number_types.Uint32Flags)

    def Required(self):
        return self._scalar(14, number_types.BoolFlags)

    def Sha256AsBytes(self):
        start = self._tab.Vector(self._tab.Offset(16))
        return bytes(self._tab.Bytes[start : start + self._length(16)])


class Graph(_Table):
    def Name(self):
        return self._string(4)

    def Role(self):
        return self._string(6)

    def Backend(self):
        return self._string(8)

    def Chunk(self):
        return self._scalar(10, number_types.Uint32Flags)

    def FirstBlock(self):
        return self._scalar(12, number_types.Uint32Flags)

    def LastBlock(self):
        return self._scalar(14, number_types.Uint32Flags)

    def Section(self):
        return self._string(16)


class Index(_Table):
    @classmethod
    def GetRootAs(cls, buf, offset=0):
        root = cls()
        root.Init(buf, encode.Get(packer.uoffset, buf, offset) + offset)
        return root

    def Sections(self, j):
        return self._element(4, j, Section())

    def SectionsLength(self):
        return self._length(4)

    def Graphs(self, j):
        return self._element(6, j, Graph())

    def GraphsLength(self):
        return self._length(6)


def SectionStart(builder: Builder):
    builder.StartObject(7)


def SectionAddKind(builder: Builder, kind):
    builder.PrependUOffsetTRelativeSlot(0, kind, 0)


def SectionAddName(builder: Builder, name):
    builder.PrependUOffsetTRelativeSlot(1, name, 0)


def SectionAddOffset(builder: Builder, offset):
    builder.PrependUint64Slot(2, offset, 0)


def SectionAddLength(builder: Builder, length):
    builder.PrependUint64Slot(3, length, 0)


def SectionAddAlignment(builder: Builder, alignment):
    builder.PrependUint32Slot(4, alignment, 0)


def SectionAddRequired(builder: Builder, required):
    builder.PrependBoolSlot(5, required, False)


def SectionAddSha256(builder: Builder, sha256):
    builder.PrependUOffsetTRelativeSlot(6, sha256, 0)


def SectionEnd(builder: Builder):
    return builder.EndObject()


def GraphStart(builder: Builder):
    builder.StartObject(7)


def GraphAddName(builder: Builder, name):
    builder.PrependUOffsetTRelativeSlot(0, name, 0)


def GraphAddRole(builder: Builder, role):
    builder.PrependUOffsetTRelativeSlot(1, role, 0)


def GraphAddBackend(builder: Builder, backend):
    builder.PrependUOffsetTRelativeSlot(2, backend, 0)


def GraphAddChunk(builder: Builder, chunk):
    builder.PrependUint32Slot(3, chunk, 0)


def GraphAddFirstBlock(builder: Builder, first_block):
    builder.PrependUint32Slot(4, first_block, 0)


def GraphAddLastBlock(builder: Builder, last_block):
    builder.PrependUint32Slot(5, last_block, 0)


def GraphAddSection(builder: Builder, section):
    builder.PrependUOffsetTRelativeSlot(6, section, 0)


def GraphEnd(builder: Builder):
    return builder.EndObject()


def IndexStart(builder: Builder):
    builder.StartObject(2)


def IndexAddSections(builder: Builder, sections):
    builder.PrependUOffsetTRelativeSlot(0, sections, 0)


def IndexAddGraphs(builder: Builder, graphs):
    builder.PrependUOffsetTRelativeSlot(1, graphs, 0)


def IndexEnd(builder: Builder):
    return builder.EndObject()
