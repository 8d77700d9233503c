"""Read configs of Triton models with Triton's own schema."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

REQUEST = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
READ = {
    name: json_format.MessageToDict(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True)
    for name, text in REQUEST.items()
}
ANSWER = {"software": {"tritonclient": version("tritonclient")}, "configs": READ}
Path(sys.argv[2]).write_text(json.dumps(ANSWER), encoding="utf-8")
