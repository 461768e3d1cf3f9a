use http_body_util::BodyExt;
use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Status and detail of the refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, ApiError>) -> (u16, Value) {
    let error = result.unwrap_err();
    let body = error.reply().into_body();
    let bytes = futures_util::FutureExt::now_or_never(body.collect())
        .unwrap()
        .unwrap()
        .to_bytes();
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    (error.status().as_u16(), value["detail"].clone())
}

fn command(body: &str) -> Result<CommandRequest, ApiError> {
    Body::parse(body.as_bytes()).and_then(|body| body.command())
}

#[test]
fn defaults_and_all_fields() {
    let least = command(r#"{"command":"1"}"#).unwrap();
    assert_eq!(least.timeout_s, 60);
    assert_eq!(least.language, Language::Python);
    let id = "550e8400-e29b-41d4-a716-446655440000";
    let most = command(&format!(
        r#"{{"code":"ls","api_key":"k","session_id":"{id}","language":"bash","timeout":"5","vault_ids":["v"],"later":1}}"#
    ))
    .unwrap();
    assert_eq!(most.session_id.unwrap().to_string(), id);
    assert_eq!((most.code.as_str(), most.timeout_s), ("ls", 5));
    assert_eq!(most.vault_ids, ["v"]);
}

#[test]
fn every_fault_of_a_body_is_told_at_once() {
    let (status, detail) = refused(command(
        r#"{"command":5,"timeout":"x","language":"q","code":[],"vault_ids":[1,null],"session_id":"../etc"}"#,
    ));
    assert_eq!(status, 422);
    let told: Vec<_> = detail
        .as_array()
        .unwrap()
        .iter()
        .map(|fault| (fault["type"].as_str().unwrap(), fault["loc"].to_string()))
        .collect();
    let expected = [
        ("string_type", r#"["body","command"]"#),
        ("string_type", r#"["body","code"]"#),
        ("uuid_parsing", r#"["body","session_id"]"#),
        ("enum", r#"["body","language"]"#),
        ("int_parsing", r#"["body","timeout"]"#),
        ("string_type", r#"["body","vault_ids",0]"#),
        ("string_type", r#"["body","vault_ids",1]"#),
    ];
    let expected: Vec<_> = expected
        .iter()
        .map(|(kind, loc)| (*kind, (*loc).to_owned()))
        .collect();
    assert_eq!(told, expected);
}

#[test]
fn faults_have_fastapi_s_words() {
    let table = [
        (
            r#"{"command":"x","timeout":0}"#,
            json!([{"type":"greater_than_equal","loc":["body","timeout"],"msg":"Input should be greater than or equal to 1","input":0,"ctx":{"ge":1}}]),
        ),
        (
            r#"{"command":"x","language":"ruby"}"#,
            json!([{"type":"enum","loc":["body","language"],"msg":"Input should be 'python', 'bash' or 'javascript'","input":"ruby","ctx":{"expected":"'python', 'bash' or 'javascript'"}}]),
        ),
        (
            "[]",
            json!([{"type":"model_attributes_type","loc":["body"],"msg":"Input should be a valid dictionary or object to extract fields from","input":[]}]),
        ),
        (
            "",
            json!([{"type":"missing","loc":["body"],"msg":"Field required","input":null}]),
        ),
        (
            r#"{"command":1"#,
            json!([{"type":"json_invalid","loc":["body",12],"msg":"JSON decode error","input":{},"ctx":{"error":"Expecting ',' delimiter"}}]),
        ),
        (
            r#"{"api_key":"secret"}"#,
            json!([{"type":"value_error","loc":["body"],"msg":"Value error, either 'command' or 'code' is required","input":{"api_key":"**********"},"ctx":{"error":{}}}]),
        ),
        (
            r#"{"code":"a\u0000b"}"#,
            json!([{"type":"value_error","loc":["body","code"],"msg":"Value error, NUL characters are not allowed","input":"a\u{0}b","ctx":{"error":{}}}]),
        ),
    ];
    for (body, detail) in table {
        assert_eq!(refused(command(body)), (422, detail), "{body}");
    }
}

#[test]
fn invalid_utf8_is_400() {
    let (status, detail) = refused(Body::parse(b"{\"command\":\"\xff\"}"));
    assert_eq!(
        (status, detail),
        (400, json!("There was an error parsing the body"))
    );
}

#[test]
fn sessions_need_a_key_and_sane_figures() {
    let session = |body: &str, key| {
        Body::parse(body.as_bytes()).and_then(|body| body.session(key, &VmConfig::default()))
    };
    let spec = session(
        r#"{"api_key":"k","vm_lifetime_seconds":20,"vcpu_count":4,"env":{"A":"b"}}"#,
        false,
    );
    let spec = spec.unwrap().spec;
    assert_eq!(
        (spec.lifetime.as_secs(), spec.vcpus, spec.memory_mib),
        (20, 4, 512)
    );
    assert!(session("{}", true).is_ok());
    let (status, detail) = refused(session(
        r#"{"memory_mb":64,"vcpu_count":3,"metadata":[],"env":{"A":5,"B=":"x"}}"#,
        false,
    ));
    let kinds: Vec<_> = detail
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["type"].clone())
        .collect();
    assert_eq!(status, 422);
    assert_eq!(
        kinds,
        [
            "missing",
            "greater_than_equal",
            "literal_error",
            "dict_type",
            "string_type",
            "value_error"
        ]
    );
    assert_eq!(detail[2]["msg"], "Input should be 1, 2, 4, 6 or 8");
}

#[test]
fn kill_wants_a_uuid() {
    let kill = |body: &str| Body::parse(body.as_bytes()).and_then(|body| body.kill());
    assert_eq!(refused(kill("{}")).0, 422);
    assert_eq!(refused(kill(r#"{"session_id":"x"}"#)).0, 400);
    assert_eq!(refused(kill(r#"{"session_id":5}"#)).0, 422);
    assert!(kill(r#"{"session_id":"550E8400-E29B-41D4-A716-446655440000"}"#).is_ok());
}

#[test]
fn the_password_form_is_fastapi_s() {
    assert_eq!(
        password_form(b"username=a&password=b%20c").unwrap(),
        ("a".into(), "b c".into())
    );
    let (status, detail) = refused(password_form(b"grant_type=x&username="));
    assert_eq!(status, 422);
    let kinds: Vec<_> = detail
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["type"].clone())
        .collect();
    assert_eq!(kinds, ["string_pattern_mismatch", "missing", "missing"]);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(body) = Body::parse(&bytes) {
            drop((body.command(), body.session(false, &VmConfig::default()), body.kill()));
        }
    }

    #[test]
    fn fields_of_any_type_are_read_or_refused_with_422(
        name in "command|code|api_key|session_id|language|timeout|vault_ids|env|metadata",
        value in prop_oneof![
            Just(json!(null)), Just(json!([])), Just(json!({})), any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(|f| json!(f)), "\\PC{0,20}".prop_map(Value::from), any::<bool>().prop_map(Value::from),
        ],
    ) {
        let body = json!({ name: value }).to_string();
        if let Err(error) = command(&body) {
            prop_assert_eq!(error.status().as_u16(), 422);
        }
    }
}
