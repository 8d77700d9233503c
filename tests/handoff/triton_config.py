"""Reading a config.pbtxt as Triton does: Protocol Buffers' own text parser, over the part of the schema that bundles use.

Names, numbers and types are those of the public model_config.proto; a field that is not among them is an error.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

_MESSAGES: dict[str, list[tuple[str, int, str, bool]]] = {  # field, number, type, repeated
    "ModelInput": [("name", 1, "string", False), ("data_type", 2, "DataType", False), ("dims", 4, "int64", True)],
    "ModelOutput": [
        ("name", 1, "string", False),
        ("data_type", 2, "DataType", False),
        ("dims", 3, "int64", True),
        ("label_filename", 4, "string", False),
    ],
    "ModelInstanceGroup": [("count", 2, "int32", False), ("kind", 4, "Kind", False)],
    "ModelDynamicBatching": [
        ("preferred_batch_size", 1, "int32", True),
        ("max_queue_delay_microseconds", 2, "uint64", False),
    ],
    "ModelParameter": [("string_value", 1, "string", False)],
    "ParametersEntry": [("key", 1, "string", False), ("value", 2, "ModelParameter", False)],
    "ModelConfig": [
        ("name", 1, "string", False),
        ("max_batch_size", 4, "int32", False),
        ("input", 5, "ModelInput", True),
        ("output", 6, "ModelOutput", True),
        ("instance_group", 7, "ModelInstanceGroup", True),
        ("default_model_filename", 8, "string", False),
        ("dynamic_batching", 11, "ModelDynamicBatching", False),
        ("parameters", 14, "ParametersEntry", True),
        ("backend", 17, "string", False),
    ],
}
_ENUMS = {
    "DataType": {
        "TYPE_INVALID": 0,
        "TYPE_INT32": 8,
        "TYPE_INT64": 9,
        "TYPE_FP16": 10,
        "TYPE_FP32": 11,
        "TYPE_STRING": 13,
    },
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
}


def _schema() -> Any:
    fields = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "string": fields.TYPE_STRING,
        "int32": fields.TYPE_INT32,
        "int64": fields.TYPE_INT64,
        "uint64": fields.TYPE_UINT64,
    }
    file = descriptor_pb2.FileDescriptorProto(name="test_model_config.proto", package="inference", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, rows in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in rows:
            label = fields.LABEL_REPEATED if repeated else fields.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in scalars:
                added.type = scalars[kind]
            else:
                added.type = fields.TYPE_ENUM if kind in _ENUMS else fields.TYPE_MESSAGE
                added.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def read_config(text: str) -> dict[str, Any]:
    """Return a config as plain values; `parameters` by key."""
    message = text_format.Parse(text, _schema()())
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    found["parameters"] = {entry["key"]: entry["value"]["string_value"] for entry in found["parameters"]}
    return found
