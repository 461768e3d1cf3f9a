"""The document that describes the API: valid, whole, and true."""

import re

import openapi_spec_validator
import pytest

ROUTES = {
    ("post", "/execute"),
    ("post", "/execute_async"),
    ("get", "/v1/executions/{task_id}"),
    ("post", "/v1/sessions/session"),
    ("get", "/v1/sessions/session/{session_id}"),
    ("get", "/v1/sessions/status/{session_id}"),
    ("post", "/kill"),
    ("get", "/v1/users/me"),
    ("post", "/token"),
    ("get", "/v1/sessions/usage/{session_id}"),
    ("get", "/v1/sessions/sandboxes"),
    ("get", "/v1/sessions/app-url/{session_id}"),
    ("get", "/v1/users/me/usage-breakdown"),
    ("post", "/v1/vms"),
    ("get", "/v1/vms"),
    ("get", "/v1/vms/"),
    ("get", "/v1/vms/{vm_id}"),
    ("patch", "/v1/vms/{vm_id}"),
    ("delete", "/v1/vms/{vm_id}"),
    ("post", "/v1/vms/{vm_id}/clone"),
    ("post", "/v1/vms/{vm_id}/snapshot"),
    ("post", "/v1/vms/{vm_id}/suspend"),
    ("post", "/v1/vms/{vm_id}/resume"),
    ("post", "/v1/vms/{vm_id}/stage-env"),
    ("get", "/v1/vms/{vm_id}/volumes"),
    ("get", "/v1/snapshots"),
    ("post", "/v1/snapshots"),
    ("get", "/v1/snapshots/{snapshot_id}"),
    ("delete", "/v1/snapshots/{snapshot_id}"),
    ("get", "/v1/api-keys/"),
    ("post", "/v1/api-keys/"),
    ("get", "/v1/api-keys/{key_id}"),
    ("patch", "/v1/api-keys/{key_id}"),
    ("delete", "/v1/api-keys/{key_id}"),
    ("get", "/v1/ssh-keys"),
    ("post", "/v1/ssh-keys"),
    ("delete", "/v1/ssh-keys/{key_id}"),
    ("get", "/v1/egress/session/{session_id}"),
    ("post", "/v1/egress/session/{session_id}"),
    ("get", "/v1/egress/vm/{vm_id}"),
    ("post", "/v1/egress/vm/{vm_id}"),
    ("get", "/v1/audit/catalog"),
    ("get", "/v1/audit/events"),
    ("get", "/v1/audit/events/{event_id}"),
    ("get", "/v1/vaults"),
    ("get", "/v1/volumes"),
    ("get", "/v1/tapes"),
    ("get", "/v1/recordings"),
    ("get", "/v1/templates"),
    ("get", "/v1/webhooks/endpoints"),
    ("get", "/v1/webhooks/deliveries"),
    ("get", "/v1/credits/usage"),
    ("get", "/v1/custom-domains"),
    ("get", "/v1/browser/sessions/"),
    ("get", "/health"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
}


@pytest.fixture(scope="module")
def document(server):
    return server.client().get("/openapi.json").json()


def operations(document):
    return {(method, path): op for path, item in document["paths"].items() for method, op in item.items()}


def test_the_document_is_valid(document):
    openapi_spec_validator.validate(document)


def test_every_route_is_documented_and_exists(document, client):
    found = operations(document)
    assert set(found) >= ROUTES
    for method, path in found:
        real = re.sub(r"\{.*?\}", "00000000-0000-4000-8000-000000000000", path)
        reply = client.http.request(method, client.url + real, json={}, timeout=30)
        missing = reply.status_code == 404 and reply.json() == {"detail": "Not Found"}
        assert not missing and reply.status_code != 405, (method, path)


def resolve(document, schema):
    while "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/")
        schema = document["components"]["schemas"][name]
    return schema


def test_the_command_is_as_the_api_has_it(document):
    schema = resolve(document, {"$ref": "#/components/schemas/CommandRequest"})
    assert set(schema["properties"]) == {
        "command", "code", "api_key", "session_id", "language", "timeout", "vault_ids", "context",
    }
    timeout = schema["properties"]["timeout"]
    assert (timeout["minimum"], timeout["maximum"], timeout["default"]) == (1, 600, 60)
    for path in ("/execute", "/execute_async"):
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": "#/components/schemas/CommandRequest"}
        assert set(operation["responses"]) >= {"200", "422"}
        refused = operation["responses"]["422"]["content"]["application/json"]["schema"]
        assert refused == {"$ref": "#/components/schemas/HTTPValidationError"}


def test_the_ways_to_authenticate_are_declared(document):
    kinds = {scheme["type"] for scheme in document["components"]["securitySchemes"].values()}
    assert kinds >= {"oauth2", "apiKey"}
    assert document["paths"]["/execute"]["post"]["security"]
    assert not document["paths"]["/health"]["get"].get("security")


def test_real_replies_have_the_documented_fields(document, session):
    import jsonschema

    out = session.python("1")
    task = session.submit("1")
    replies = {
        "CommandResult": out,
        "Task": session.client.task(task),
        "SessionStatus": session.status(),
        "Session": session.client.get(f"/v1/sessions/session/{session.id}").json(),
        "User": session.client.get("/v1/users/me").json(),
        "Health": session.client.get("/health").json(),
        "HTTPValidationError": session.client.post("/execute", {}).json(),
        "Killed": session.client.post("/kill", {"session_id": session.id}).json(),
    }
    for name, reply in replies.items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(reply)


def test_metrics_are_there_and_count(client, shared):
    before = client.get("/metrics").text
    shared.python("1")
    after = client.get("/metrics")
    assert after.headers["Content-Type"].startswith("application/openmetrics-text")
    assert after.text.endswith("# EOF\n")
    name = 'thaw_http_requests_total{route="/execute",status="200"}'

    def count(text):
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    assert count(after.text) == count(before) + 1
    for metric in ("thaw_session_phase_seconds", "thaw_session_pool_parked", "thaw_session_vms", "thaw_http_in_flight"):
        assert f"# TYPE {metric} " in after.text, metric


def test_health_says_the_version(client):
    shown = client.get("/health").json()
    assert shown["status"] == "ok" and re.fullmatch(r"\d+\.\d+\.\d+.*", shown["version"])
