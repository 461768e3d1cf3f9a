//! `GET /v1/users/me` and `POST /token`.

use hyper::StatusCode;
use serde_json::json;

use crate::http::app::Call;
use crate::http::auth::Refusal;
use crate::http::body::password_form;
use crate::http::error::ApiError;
use crate::http::reply::{self, Reply};

pub(super) async fn me(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let user = &caller.user;
    let shown = json!({
        "id": user.id,
        "name": user.name,
        "email": user.email,
        "is_verified": true,
        "plan": user.plan,
    });
    Ok(reply::json(StatusCode::OK, &shown))
}

pub(super) async fn token(mut call: Call) -> Result<Reply, ApiError> {
    let (name, password) = password_form(&call.bytes().await?)?;
    let token = call
        .app
        .auth
        .log_in(&name, &password)
        .await
        .map_err(|refusal| {
            call.app.metrics.refused.inc();
            match refusal {
                Refusal::TooManyLogins => refusal.into(),
                _ => ApiError::new(StatusCode::UNAUTHORIZED, "Incorrect username or password"),
            }
        })?;
    let shown = json!({
        "access_token": token,
        "token_type": "bearer",
        "expires_in": call.app.auth.token_lifetime_s(),
    });
    let mut reply = reply::json(StatusCode::OK, &shown);
    let no_store = hyper::header::HeaderValue::from_static("no-store");
    reply
        .headers_mut()
        .insert(hyper::header::CACHE_CONTROL, no_store);
    Ok(reply)
}
