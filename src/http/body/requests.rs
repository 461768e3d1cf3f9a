//! The bodies of the API's requests, validated whole.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::fields::{Fields, echo};
use super::json;
use crate::config::VmConfig;
use crate::http::error::{ApiError, Fault};
use crate::session::{ContextName, Language, SessionId, SessionSpec};

/// Most bytes of a session's environment, names and values. Its agent passes it on in one frame.
const MOST_ENV_BYTES: usize = 64 << 10;

/// Most bytes of a session's metadata as JSON. It is kept in memory for every session.
const MOST_METADATA_BYTES: usize = 64 << 10;

const LANGUAGES: &[(&str, Language)] = &[
    ("python", Language::Python),
    ("bash", Language::Bash),
    ("javascript", Language::Javascript),
];

/// The body of `POST /execute` and `POST /execute_async`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandRequest {
    /// What to run: `command`, or `code` when there is no command.
    pub code: String,
    /// The session; absent, one is made.
    pub session_id: Option<SessionId>,
    /// The command's language.
    pub language: Language,
    /// Which of the session's interpreters.
    pub context: Option<ContextName>,
    /// Seconds, 1 to 600.
    pub timeout_s: u32,
    /// Vaults to attach.
    pub vault_ids: Vec<String>,
}

/// The body of `POST /v1/sessions/session`.
#[derive(Clone, Debug)]
pub struct SessionRequest {
    /// What to make.
    pub spec: SessionSpec,
}

/// A body as JSON, with its `api_key` at hand, before anything else is looked at.
#[derive(Debug)]
pub struct Body {
    value: Value,
}

impl Body {
    /// Reads a body.
    ///
    /// # Errors
    /// 400 when it is not UTF-8, 422 when it is not JSON or empty; as FastAPI answers.
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(bytes).map_err(|_| {
            ApiError::new(
                hyper::StatusCode::BAD_REQUEST,
                "There was an error parsing the body",
            )
        })?;
        if text.is_empty() {
            return Err(ApiError::invalid(&[Fault {
                kind: "missing",
                loc: vec!["body".into()],
                msg: "Field required".into(),
                input: Value::Null,
                ctx: None,
            }]));
        }
        json::parse(text)
            .map(|value| Self { value })
            .map_err(|fault| ApiError::invalid(&[*fault]))
    }

    /// Reads a body that may be absent, as for calls that usually have none.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_optional(bytes: &[u8]) -> Result<Self, ApiError> {
        if bytes.is_empty() {
            let value = Value::Object(serde_json::Map::new());
            return Ok(Self { value });
        }
        Self::parse(bytes)
    }

    /// Reads the fields of a body that is an object.
    ///
    /// # Errors
    /// 422 with everything that is wrong.
    pub fn fields<T>(&self, read: impl FnOnce(&mut Fields<'_>) -> T) -> Result<T, ApiError> {
        let mut fields = Fields::of(&self.value).map_err(|fault| ApiError::invalid(&[*fault]))?;
        let value = read(&mut fields);
        match fields.finish() {
            Ok(()) => Ok(value),
            Err(faults) => Err(ApiError::invalid(&faults)),
        }
    }

    /// The key that the body has, if it is text.
    pub fn api_key(&self) -> Option<&str> {
        self.value.get("api_key")?.as_str()
    }

    /// As a command.
    ///
    /// # Errors
    /// 422 with everything that is wrong.
    pub fn command(&self) -> Result<CommandRequest, ApiError> {
        let mut fields = Fields::of(&self.value).map_err(|fault| ApiError::invalid(&[*fault]))?;
        let command = fields.optional_string("command");
        let code = fields.optional_string("code");
        fields.optional_string("api_key");
        let session_id = session_id(&mut fields);
        let language = fields.choice("language", LANGUAGES, Language::Python);
        let context = fields.optional_string("context").and_then(|text| {
            let name = ContextName::parse(&text);
            if name.is_none() {
                let why = "a context's name is 1 to 64 of A-Z a-z 0-9 . _ -";
                fields.value_error(&["context"], why);
            }
            name
        });
        let timeout_s = fields.int("timeout", 60, 1, 600);
        let vault_ids = fields.strings("vault_ids");
        for (name, text) in [("command", &command), ("code", &code)] {
            if text.as_ref().is_some_and(|text| text.contains('\0')) {
                fields.value_error(&[name], "NUL characters are not allowed");
            }
        }
        let given = |name: &str| self.value.get(name).is_some_and(|value| !value.is_null());
        if !given("command") && !given("code") {
            fields.value_error(&[], "either 'command' or 'code' is required");
        }
        fields
            .finish()
            .map_err(|faults| ApiError::invalid(&faults))?;
        Ok(CommandRequest {
            code: command
                .filter(|text| !text.is_empty())
                .or(code)
                .unwrap_or_default(),
            session_id,
            language,
            context,
            timeout_s: u32::try_from(timeout_s).unwrap_or(60),
            vault_ids,
        })
    }

    /// As the wish for a session. The key may be absent when a header has one.
    ///
    /// # Errors
    /// 422 with everything that is wrong.
    pub fn session(
        &self,
        key_in_header: bool,
        defaults: &VmConfig,
    ) -> Result<SessionRequest, ApiError> {
        let mut fields = Fields::of(&self.value).map_err(|fault| ApiError::invalid(&[*fault]))?;
        if key_in_header {
            fields.optional_string("api_key");
        } else {
            fields.required_string("api_key");
        }
        let base = SessionSpec {
            lifetime: Duration::from_secs(defaults.lifetime_s),
            memory_mib: defaults.memory_mib,
            vcpus: defaults.vcpus,
            metadata: BTreeMap::new(),
            env: BTreeMap::new(),
        };
        let spec = session_spec(&mut fields, base);
        fields
            .finish()
            .map_err(|faults| ApiError::invalid(&faults))?;
        Ok(SessionRequest { spec })
    }

    /// The same without the fields that are null, for bodies where that is as good as absent.
    pub fn without_nulls(mut self) -> Self {
        if let Value::Object(object) = &mut self.value {
            object.retain(|_, value| !value.is_null());
        }
        self
    }

    /// As the wish to end a session's VM. An id that is not one is 400, as documented.
    ///
    /// # Errors
    /// 422 when the field is missing or not text, 400 when it is not a UUID.
    pub fn kill(&self) -> Result<SessionId, ApiError> {
        let mut fields = Fields::of(&self.value).map_err(|fault| ApiError::invalid(&[*fault]))?;
        let text = fields.required_string("session_id").unwrap_or_default();
        fields
            .finish()
            .map_err(|faults| ApiError::invalid(&faults))?;
        parse_id(&text).map_err(|why| {
            let detail = format!("session_id is not a UUID: {why}");
            ApiError::new(hyper::StatusCode::BAD_REQUEST, detail)
        })
    }
}

/// What a session is made with: what the body says, else what it is already.
pub fn session_spec(fields: &mut Fields<'_>, base: SessionSpec) -> SessionSpec {
    let lifetime_s = fields.int(
        "vm_lifetime_seconds",
        i64::try_from(base.lifetime.as_secs()).unwrap_or(86_400),
        20,
        86_400,
    );
    let memory_mib = fields.int("memory_mb", base.memory_mib.into(), 128, 8192);
    let vcpus = fields.literal_int("vcpu_count", &[1, 2, 4, 6, 8], base.vcpus.into());
    let metadata = metadata(fields).unwrap_or(base.metadata);
    let env = match fields.given("env") {
        true => fields.string_map("env"),
        false => base.env,
    };
    check_env(fields, &env);
    SessionSpec {
        lifetime: Duration::from_secs(lifetime_s.unsigned_abs()),
        memory_mib: u32::try_from(memory_mib).unwrap_or(base.memory_mib),
        vcpus: u32::try_from(vcpus).unwrap_or(base.vcpus),
        metadata,
        env,
    }
}

/// A client's labels.
pub fn metadata(fields: &mut Fields<'_>) -> Option<BTreeMap<String, Value>> {
    let metadata: BTreeMap<String, Value> = fields
        .object("metadata")
        .map(|map| map.iter().map(|(k, v)| (k.clone(), v.clone())).collect())?;
    let bytes = serde_json::to_vec(&metadata).map_or(usize::MAX, |text| text.len());
    if bytes > MOST_METADATA_BYTES {
        fields.value_error(&["metadata"], "metadata has at most 65536 bytes as JSON");
    }
    Some(metadata)
}

/// Judges variables, whose values are not sent back.
pub fn check_env(fields: &mut Fields<'_>, env: &BTreeMap<String, String>) {
    let bytes: usize = env
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if bytes > MOST_ENV_BYTES {
        fields.value_error(&["env"], "env has at most 65536 bytes");
    }
    for (name, value) in env {
        let bad_name = name.is_empty() || name.contains(['=', '\0']);
        if bad_name || value.contains('\0') {
            let why = "a variable has a name without '=' and no NUL characters";
            fields.value_error(&["env", name], why);
        }
    }
}

/// A session's id, in any spelling of a UUID.
pub fn session_id(fields: &mut Fields<'_>) -> Option<SessionId> {
    let text = fields.optional_string("session_id")?;
    match parse_id(&text) {
        Ok(id) => Some(id),
        Err(error) => {
            let msg = format!("Input should be a valid UUID, {error}");
            let ctx = Some(serde_json::json!({ "error": error }));
            fields.fault(
                &["session_id"],
                "uuid_parsing",
                msg,
                echo(&text.into()),
                ctx,
            );
            None
        }
    }
}

/// Any spelling of a UUID, as pydantic takes it.
fn parse_id(text: &str) -> Result<SessionId, String> {
    let id = uuid::Uuid::parse_str(text).map_err(|error| error.to_string())?;
    SessionId::parse(&id.as_hyphenated().to_string()).ok_or_else(|| "unknown version".into())
}

/// A field that is not there and must be.
pub fn missing(name: &str) -> Fault {
    Fault {
        kind: "missing",
        loc: vec!["body".into(), name.into()],
        msg: "Field required".into(),
        input: Value::Null,
        ctx: None,
    }
}

/// Reads a urlencoded form, whose values are all texts.
///
/// # Errors
/// 422 with everything that is wrong.
pub fn form<T>(body: &[u8], read: impl FnOnce(&mut Fields<'_>) -> T) -> Result<T, ApiError> {
    let values: serde_json::Map<String, Value> = form_urlencoded::parse(body)
        .map(|(name, value)| (name.into_owned(), value.into_owned().into()))
        .collect();
    Body {
        value: Value::Object(values),
    }
    .fields(read)
}

/// The fields of an OAuth2 password form, as FastAPI's `OAuth2PasswordRequestForm` reads them.
///
/// # Errors
/// 422 with everything that is wrong.
pub fn password_form(body: &[u8]) -> Result<(String, String), ApiError> {
    let mut form: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(body) {
        form.insert(name.into_owned(), value.into_owned());
    }
    let mut faults = Vec::new();
    if let Some(kind) = form.get("grant_type").filter(|kind| *kind != "password") {
        faults.push(Fault {
            kind: "string_pattern_mismatch",
            loc: vec!["body".into(), "grant_type".into()],
            msg: "String should match pattern '^password$'".into(),
            input: echo(&kind.clone().into()),
            ctx: Some(serde_json::json!({ "pattern": "^password$" })),
        });
    }
    let mut field = |name: &str| {
        form.remove(name)
            .filter(|value| !value.is_empty())
            .unwrap_or_else(|| {
                faults.push(missing(name));
                String::new()
            })
    };
    let pair = (field("username"), field("password"));
    if faults.is_empty() {
        Ok(pair)
    } else {
        Err(ApiError::invalid(&faults))
    }
}

#[cfg(test)]
mod tests;
