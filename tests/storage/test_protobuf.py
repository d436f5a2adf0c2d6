"""Messages that the protobuf library wrote are read field by field; what is cut short is an error."""

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, SourceCodeInfo, UninterpretedOption
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.storage.protobuf import read_fields, read_varint, read_varints

NUMBERS = st.integers(0, 2**63 - 1)


@given(number=st.integers(0, 2**31 - 1), name=st.text(max_size=300))
def test_fields_are_those_that_the_library_wrote(number, name):
    message = FieldDescriptorProto(name=name, number=number).SerializeToString()
    assert dict(read_fields(message)) == {1: name.encode(), 3: number}


@given(double=st.floats(allow_nan=False), whole=NUMBERS)
def test_fixed_size_fields_are_bytes(double, whole):
    message = UninterpretedOption(double_value=double, positive_int_value=whole).SerializeToString()
    fields = dict(read_fields(message))
    assert UninterpretedOption.FromString(b"\x31" + fields[6]).double_value == double and fields[4] == whole


@given(path=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9))
def test_packed_numbers_are_varints(path):
    message = SourceCodeInfo.Location(path=path).SerializeToString()
    ((number, packed),) = read_fields(message)
    assert number == 1 and list(read_varints(packed)) == path
    assert read_varint(memoryview(packed), 0)[0] == path[0]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"\x0a\x05four", "it ends inside field 1"),
        (b"\x35abc", "it ends inside field 6"),
        (b"\x18\x80", "it ends inside a number"),
        (b"\x18", "it ends inside a number"),
        (b"\x0b", "wire type 3 at byte 1"),
    ],
)
def test_damaged_messages(message, error):
    with pytest.raises(ValueError, match=error):
        list(read_fields(message))
