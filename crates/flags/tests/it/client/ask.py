"""Asks with the official OpenFeature client: a question per line of standard input, an answer per line of output."""

import json
import os
import sys

from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext

api.set_provider(OFREPProvider(os.environ["OFREP_ENDPOINT"], headers_factory=lambda: {"X-API-Key": "secret"}))
client = api.get_client()

for line in sys.stdin:
    question = json.loads(line)
    evaluate = getattr(client, f"get_{question['kind']}_details")
    context = EvaluationContext(question.get("key"), question.get("attributes", {}))
    details = evaluate(question["flag"], question["default"], context)
    answer = {
        "value": details.value,
        "variant": details.variant,
        "reason": details.reason,
        "error": details.error_code,
        "metadata": dict(details.flag_metadata),
    }
    print(json.dumps(answer), flush=True)
