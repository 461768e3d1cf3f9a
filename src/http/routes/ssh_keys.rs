//! `/v1/ssh-keys`: a user's public SSH keys. They are kept for the day when guests can be
//! reached by SSH.

use hyper::StatusCode;
use serde_json::{Value, json};
use ssh_key::{HashAlg, PublicKey};

use super::{Access, Endpoint, Group, Takes};
use crate::audit::Event;
use crate::http::app::Call;
use crate::http::error::ApiError;
use crate::http::openapi::{array, object, text, time, truth};
use crate::http::reply::{self, Reply, iso_ms};
use crate::store::SshKeyRow;

/// Most keys of one user.
const MOST_KEYS: usize = 100;

/// Most bytes of a key: RSA of 16384 bits takes 2.8 KiB.
const MOST_BYTES: usize = 8192;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/ssh-keys",
            name: "list_ssh_keys",
            summary: "Your public SSH keys",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "SshKeys",
            refuses: &[],
            handler: |call| Box::pin(list(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/ssh-keys",
            name: "add_ssh_key",
            summary: "Add a public SSH key; one that is there already stays as it is",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("SshKeyRequest"),
            gives: "SshKey",
            refuses: &[],
            handler: |call| Box::pin(add(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/ssh-keys/{key_id}",
            name: "delete_ssh_key",
            summary: "Remove a public SSH key",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "SshKeyDeleted",
            refuses: &[404],
            handler: |call| Box::pin(remove(call)),
        },
    ],
    schemas: || {
        let id = || json!({ "type": "integer" });
        vec![
            (
                "SshKeyRequest",
                object(
                    &["public_key"],
                    json!({ "public_key": { "type": "string", "maxLength": MOST_BYTES, "description": "As in authorized_keys" } }),
                ),
            ),
            (
                "SshKey",
                object(
                    &["id", "fingerprint"],
                    json!({
                        "id": id(), "public_key": text(), "fingerprint": text(), "comment": text(),
                        "key_type": text(), "created_at": time(),
                    }),
                ),
            ),
            (
                "SshKeys",
                object(&["keys"], json!({ "keys": array("SshKey") })),
            ),
            (
                "SshKeyDeleted",
                object(
                    &["success", "id"],
                    json!({ "success": truth(), "id": id(), "status": text() }),
                ),
            ),
        ]
    },
};

fn shown(row: &SshKeyRow) -> Value {
    json!({
        "id": row.id,
        "public_key": row.public_key,
        "fingerprint": row.fingerprint,
        "comment": row.comment,
        "key_type": row.public_key.split(' ').next().unwrap_or_default(),
        "created_at": iso_ms(row.created_ms),
    })
}

async fn list(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let tenant = caller.tenant.0.clone();
    let rows = call
        .app
        .control
        .store
        .call(move |c| SshKeyRow::of(c, &tenant));
    let keys: Vec<Value> = rows.await?.iter().map(shown).collect();
    Ok(reply::json(StatusCode::OK, &json!({ "keys": keys })))
}

async fn add(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_body().await?;
    let key = body.fields(|fields| {
        let text = fields.required_string("public_key")?;
        parse(&text)
            .inspect_err(|why| fields.value_error(&["public_key"], why))
            .ok()
    })?;
    let Some(key) = key else {
        return Err(ApiError::internal(&"an SSH key was not read"));
    };
    let tenant = caller.tenant.0.clone();
    let added = call
        .app
        .control
        .store
        .call(move |c| SshKeyRow::add(c, &tenant, &key, MOST_KEYS));
    let Some((row, fresh)) = added.await? else {
        let detail = format!("{MOST_KEYS} SSH keys are the most one user may have; remove one");
        return Err(ApiError::too_many(detail, 60));
    };
    if fresh {
        note(&call, &caller.tenant, "ssh_key.added", &row);
    }
    Ok(reply::json(StatusCode::OK, &shown(&row)))
}

async fn remove(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let unknown = || ApiError::not_found(format!("no SSH key {}", call.path("key_id")));
    let id: i64 = call.path("key_id").parse().map_err(|_| unknown())?;
    let tenant = caller.tenant.0.clone();
    let removed = call
        .app
        .control
        .store
        .call(move |c| SshKeyRow::remove(c, &tenant, id));
    let row = removed.await?.ok_or_else(unknown)?;
    note(&call, &caller.tenant, "ssh_key.removed", &row);
    let said = json!({ "success": true, "id": row.id, "status": "deleted" });
    Ok(reply::json(StatusCode::OK, &said))
}

/// Reads a line of `authorized_keys`.
fn parse(line: &str) -> Result<SshKeyRow, String> {
    let line = line.trim();
    if line.len() > MOST_BYTES {
        return Err(format!("a key has at most {MOST_BYTES} bytes"));
    }
    if line.contains("PRIVATE KEY") {
        return Err("this is a private key: keep it to yourself, and send the .pub file's".into());
    }
    if line.contains(['\n', '\r', '\0']) {
        return Err("a public key is one line".into());
    }
    let key = PublicKey::from_openssh(line).map_err(|error| {
        format!("this is no OpenSSH public key, such as `ssh-ed25519 AAAA... name` ({error})")
    })?;
    let public_key = key
        .to_openssh()
        .map_err(|error| format!("this key cannot be written as text ({error})"))?;
    Ok(SshKeyRow {
        id: 0,
        public_key,
        fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
        comment: key.comment().to_owned(),
        created_ms: 0,
    })
}

fn note(call: &Call, tenant: &crate::session::TenantId, kind: &'static str, row: &SshKeyRow) {
    call.app.control.vms.audit().note(
        tenant,
        Event {
            kind,
            resource: Some(("ssh_key", row.id.to_string())),
            detail: Some(row.fingerprint.clone()),
            ..Event::default()
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made with ssh-keygen, which also told the fingerprint.
    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti user@example.com";

    #[test]
    fn a_key_is_read_as_ssh_keygen_reads_it() {
        let row = parse(&format!(" {KEY}\n")).unwrap();
        assert_eq!(row.public_key, KEY);
        assert_eq!(row.comment, "user@example.com");
        assert_eq!(
            row.fingerprint,
            "SHA256:UCUiLr7Pjs9wFFJMDByLgc3NrtdU344OgUM45wZPcIQ"
        );
    }

    #[test]
    fn what_is_no_public_key_is_refused_with_a_reason() {
        let private = "-----BEGIN OPENSSH PRIVATE KEY-----\nx";
        assert!(parse(private).unwrap_err().contains("keep it to yourself"));
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 !!!",
            "hello world",
            &KEY[..40],
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&format!("{KEY}\n{KEY}")).is_err());
        assert!(parse(&"x".repeat(9000)).is_err());
    }
}
