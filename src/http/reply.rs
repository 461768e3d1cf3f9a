//! Replies: always whole, so that head and body leave in one write.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

/// A reply.
pub type Reply = Response<Full<Bytes>>;

/// A JSON reply.
pub fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(body) => raw(status, "application/json", body.into()),
        Err(error) => {
            tracing::error!(%error, "a reply cannot be written as JSON");
            let body = Bytes::from_static(b"{\"detail\":\"Internal Server Error\"}");
            raw(StatusCode::INTERNAL_SERVER_ERROR, "application/json", body)
        }
    }
}

/// A reply of any type.
pub fn raw(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let mut reply = Response::new(Full::new(body));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// A time as clients of this API read it: ISO 8601 in UTC, microseconds, with offset.
pub fn iso(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string()
}

/// As [`iso`], from milliseconds since the Unix epoch.
pub fn iso_ms(ms: i64) -> String {
    iso(jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
}

/// As [`iso`], from the standard library's clock.
pub fn iso_system(time: std::time::SystemTime) -> String {
    iso(jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_what_python_s_fromisoformat_reads() {
        assert_eq!(
            super::iso_ms(1_768_048_496_789),
            "2026-01-10T12:34:56.789000+00:00"
        );
    }
}
