//! `POST /upload`: the form that the official client sends.

use std::time::Duration;

use http_body_util::BodyDataStream;
use hyper::StatusCode;
use hyper::header::CONTENT_TYPE;
use multer::{Constraints, Multipart, SizeLimit};

use super::run::{path, session_id};
use super::transfer::Target;
use crate::http::app::Call;
use crate::http::body::missing;
use crate::http::error::ApiError;
use crate::http::reply::Reply;

/// Longest of the form's texts.
const MOST_TEXT: u64 = 8 << 10;

/// The form's texts so far.
#[derive(Default)]
struct Texts {
    remote_path: Option<String>,
    session_id: Option<String>,
}

pub(super) async fn upload(mut call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let kind = call.parts.headers.get(CONTENT_TYPE);
    let kind = kind
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let Ok(boundary) = multer::parse_boundary(kind) else {
        return Err(ApiError::invalid(&[
            missing("remote_path"),
            missing("session_id"),
            missing("file"),
        ]));
    };
    let Some(incoming) = call.incoming() else {
        return Err(broken());
    };
    let app = call.app;
    let limits = SizeLimit::new()
        .for_field("remote_path", MOST_TEXT)
        .for_field("session_id", MOST_TEXT)
        .for_field("recursive", MOST_TEXT);
    let constraints = Constraints::new().size_limit(limits);
    let mut form =
        Multipart::with_constraints(BodyDataStream::new(incoming), boundary, constraints);
    let patience = Duration::from_secs(app.config.server.body_timeout_s);
    let mut texts = Texts::default();
    loop {
        let next = tokio::time::timeout(patience, form.next_field()).await;
        let Some(mut field) = next.map_err(|_| slow())?.map_err(|_| broken())? else {
            break;
        };
        let name = field.name().unwrap_or_default().to_owned();
        if name != "file" {
            let text = tokio::time::timeout(patience, field.text()).await;
            let text = text.map_err(|_| slow())?.map_err(|_| broken())?;
            match name.as_str() {
                "remote_path" => texts.remote_path = Some(text),
                "session_id" => texts.session_id = Some(text),
                // `recursive` and what a later client may say change nothing for one file.
                _ => {}
            }
            continue;
        }
        // The file is never held, so what to do with it must have been said before it.
        let (Some(remote), Some(session)) = (&texts.remote_path, &texts.session_id) else {
            break;
        };
        let session = session_id(session)?;
        let place = place(remote, field.file_name())?;
        let mut target = Target::open(&app, &caller, &session, place, None, true).await?;
        loop {
            let chunk = tokio::time::timeout(patience, field.chunk()).await;
            match chunk.map_err(|_| slow())?.map_err(|_| broken())? {
                Some(bytes) => target.write(bytes).await?,
                None => return target.finish().await,
            }
        }
    }
    let mut faults = Vec::new();
    if texts.remote_path.is_none() {
        faults.push(missing("remote_path"));
    }
    if texts.session_id.is_none() {
        faults.push(missing("session_id"));
    }
    if faults.is_empty() {
        faults.push(missing("file"));
    }
    Err(ApiError::invalid(&faults))
}

/// Where the file goes: a path that ends in a slash is a directory, in which the file keeps the last
/// part of its own name, and no more of that: the name is a path of the client's machine.
fn place(remote: &str, local: Option<&str>) -> Result<String, ApiError> {
    if !remote.ends_with('/') {
        return path(remote);
    }
    let name = local.unwrap_or_default();
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default();
    if name.is_empty() || name == "." || name == ".." {
        let detail = "remote_path is a directory and the file has no name; give the whole path";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
    }
    path(&format!("{remote}{name}"))
}

fn slow() -> ApiError {
    ApiError::new(
        StatusCode::REQUEST_TIMEOUT,
        "The request body took too long",
    )
}

fn broken() -> ApiError {
    let detail = "The form is broken or broke off";
    ApiError::new(StatusCode::BAD_REQUEST, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_s_own_path_never_decides_where_a_file_goes() {
        let place = |remote, local| place(remote, local).ok();
        assert_eq!(place("/a/b", Some("/etc/x")).as_deref(), Some("/a/b"));
        assert_eq!(place("/a/", Some("/etc/x")).as_deref(), Some("/a/x"));
        assert_eq!(place("/a/", Some("..\\..\\x")).as_deref(), Some("/a/x"));
        assert_eq!(place("/a/", Some("/etc/..")), None);
        assert_eq!(place("/a/", None), None);
        assert_eq!(place("", Some("x")), None);
    }
}
