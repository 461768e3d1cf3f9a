//! `/v1/egress/…`: what guests may reach. Stored and told; guests have no network yet, so there
//! is nothing to hold them back from.

use std::net::IpAddr;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::vms::vm_of;
use super::{Access, Endpoint, Group, Takes, sessions};
use crate::audit::Event;
use crate::http::app::Call;
use crate::http::body::fields::Fields;
use crate::http::error::ApiError;
use crate::http::openapi::{nullable, object, or_null, text, truth};
use crate::http::reply::{self, Reply};
use crate::session::TenantId;
use crate::store::{get_egress, set_egress};

/// Most domains, and most networks, of one policy.
const MOST_ENTRIES: usize = 256;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "GET",
            path: "/v1/egress/session/{session_id}",
            name: "get_session_egress",
            summary: "A session's egress policy",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "EgressPolicy",
            refuses: &[404],
            handler: |call| Box::pin(get_session(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/egress/session/{session_id}",
            name: "set_session_egress",
            summary: "Store a session's egress policy",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("EgressRequest"),
            gives: "EgressStored",
            refuses: &[404],
            handler: |call| Box::pin(set_session(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/egress/vm/{vm_id}",
            name: "get_vm_egress",
            summary: "A VM's egress policy: its own, else its session's",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "EgressPolicy",
            refuses: &[404],
            handler: |call| Box::pin(get_vm(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/egress/vm/{vm_id}",
            name: "set_vm_egress",
            summary: "Store a VM's egress policy",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("EgressRequest"),
            gives: "EgressStored",
            refuses: &[404],
            handler: |call| Box::pin(set_vm(call)),
        },
    ],
    schemas: || {
        let list =
            || or_null(json!({ "type": "array", "items": text(), "maxItems": MOST_ENTRIES }));
        let wanted = json!({
            "allow_public_repos": nullable("boolean"), "allow_package_managers": nullable("boolean"),
            "allow_http": nullable("boolean"), "allow_https": nullable("boolean"),
            "allowed_domains": list(), "allowed_cidrs": list(),
        });
        let told = json!({
            "allow_public_repos": truth(), "allow_package_managers": truth(),
            "allow_http": truth(), "allow_https": truth(),
            "allowed_domains": { "type": "array", "items": text() },
            "allowed_cidrs": { "type": "array", "items": text() },
            "enforced": { "type": "boolean", "description": "Whether guests are held to it" },
        });
        vec![
            ("EgressRequest", object(&[], wanted)),
            (
                "EgressPolicy",
                object(&["allow_http", "allow_https", "enforced"], told),
            ),
            (
                "EgressStored",
                object(
                    &["status"],
                    json!({ "status": text(), "policy": { "$ref": "#/components/schemas/EgressPolicy" }, "success": truth() }),
                ),
            ),
        ]
    },
};

/// What guests may reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Policy {
    allow_public_repos: bool,
    allow_http: bool,
    allow_https: bool,
    allowed_domains: Vec<String>,
    allowed_cidrs: Vec<String>,
}

impl Default for Policy {
    /// What the official client sets when nothing is said.
    fn default() -> Self {
        Self {
            allow_public_repos: true,
            allow_http: true,
            allow_https: true,
            allowed_domains: Vec::new(),
            allowed_cidrs: Vec::new(),
        }
    }
}

impl Policy {
    fn shown(&self) -> Value {
        json!({
            "allow_public_repos": self.allow_public_repos,
            // The client's two names for it.
            "allow_package_managers": self.allow_public_repos,
            "allow_http": self.allow_http,
            "allow_https": self.allow_https,
            "allowed_domains": self.allowed_domains,
            "allowed_cidrs": self.allowed_cidrs,
            "enforced": false,
        })
    }

    fn read(fields: &mut Fields<'_>) -> Self {
        let named = fields.optional_truth("allow_public_repos");
        let other = fields.optional_truth("allow_package_managers");
        let policy = Self {
            allow_public_repos: named.or(other).unwrap_or(true),
            allow_http: fields.optional_truth("allow_http").unwrap_or(true),
            allow_https: fields.optional_truth("allow_https").unwrap_or(true),
            allowed_domains: fields.strings("allowed_domains"),
            allowed_cidrs: fields.strings("allowed_cidrs"),
        };
        for (name, list) in [
            ("allowed_domains", &policy.allowed_domains),
            ("allowed_cidrs", &policy.allowed_cidrs),
        ] {
            if list.len() > MOST_ENTRIES {
                fields.value_error(&[name], "a policy has at most 256 of these");
            }
        }
        if let Some(bad) = policy.allowed_domains.iter().find(|name| !is_domain(name)) {
            let why = format!(
                "{} is no host name, such as example.org or *.example.org",
                shorten(bad)
            );
            fields.value_error(&["allowed_domains"], &why);
        }
        if let Some(bad) = policy.allowed_cidrs.iter().find(|net| !is_network(net)) {
            let why = format!("{} is no network, such as 10.0.0.0/8", shorten(bad));
            fields.value_error(&["allowed_cidrs"], &why);
        }
        policy
    }
}

/// A policy that is a field of another body.
pub(super) fn inner(fields: &mut Fields<'_>, name: &str) -> Policy {
    fields.nested(name, Policy::read).unwrap_or_default()
}

fn shorten(text: &str) -> String {
    format!("{:?}", text.chars().take(64).collect::<String>())
}

/// Labels of letters, digits, `-` and `_`, the first of which may be `*`.
fn is_domain(name: &str) -> bool {
    let rest = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    name.len() <= 253 && rest.split('.').all(label)
}

/// An address, with or without the length of a prefix.
fn is_network(net: &str) -> bool {
    let (address, prefix) = match net.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (net, None),
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return false;
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    prefix.is_none_or(|prefix| prefix.parse::<u8>().is_ok_and(|bits| bits <= most))
}

async fn get_session(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let id = sessions::session_of(&call, &caller.tenant)?;
    let policy = load(&call, &caller.tenant, &format!("session/{id}")).await?;
    Ok(reply::json(
        StatusCode::OK,
        &policy.unwrap_or_default().shown(),
    ))
}

async fn set_session(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let id = sessions::session_of(&call, &caller.tenant)?;
    let policy = body.fields(Policy::read)?;
    store(&call, &caller.tenant, &format!("session/{id}"), &policy).await
}

async fn get_vm(call: Call) -> Result<Reply, ApiError> {
    let caller = call.caller()?;
    let record = vm_of(&call, &caller.tenant)?;
    let mut policy = None;
    // A policy belongs to the VM, whatever it was called when it was set.
    for id in std::iter::once(&record.vm_id).chain(record.aliases.iter().rev()) {
        policy = load(&call, &caller.tenant, &format!("vm/{id}")).await?;
        if policy.is_some() {
            break;
        }
    }
    if policy.is_none() {
        let subject = format!("session/{}", record.session_id);
        policy = load(&call, &caller.tenant, &subject).await?;
    }
    Ok(reply::json(
        StatusCode::OK,
        &policy.unwrap_or_default().shown(),
    ))
}

async fn set_vm(mut call: Call) -> Result<Reply, ApiError> {
    let (caller, body) = call.caller_and_optional_body().await?;
    let record = vm_of(&call, &caller.tenant)?;
    let policy = body.fields(Policy::read)?;
    store(
        &call,
        &caller.tenant,
        &format!("vm/{}", record.vm_id),
        &policy,
    )
    .await
}

async fn load(call: &Call, tenant: &TenantId, subject: &str) -> Result<Option<Policy>, ApiError> {
    let (tenant, subject) = (tenant.0.clone(), subject.to_owned());
    let stored = call
        .app
        .control
        .store
        .call(move |c| get_egress(c, &tenant, &subject));
    stored
        .await?
        .map(|text| serde_json::from_str(&text).map_err(|error| ApiError::internal(&error)))
        .transpose()
}

/// Stores a policy for a subject such as `vm/<id>`.
pub(super) async fn store(
    call: &Call,
    tenant: &TenantId,
    subject: &str,
    policy: &Policy,
) -> Result<Reply, ApiError> {
    let text = serde_json::to_string(policy).map_err(|error| ApiError::internal(&error))?;
    let (of, about) = (tenant.0.clone(), subject.to_owned());
    let stored = call
        .app
        .control
        .store
        .call(move |c| set_egress(c, &of, &about, &text));
    stored.await?;
    let (kind, id) = subject.split_once('/').unwrap_or(("", subject));
    let id = Some(id.to_owned());
    let (vm_id, session_id) = if kind == "vm" { (id, None) } else { (None, id) };
    call.app.control.vms.audit().note(
        tenant,
        Event {
            kind: "egress.changed",
            vm_id,
            session_id,
            ..Event::default()
        },
    );
    let said = json!({ "status": "ok", "success": true, "policy": policy.shown() });
    Ok(reply::json(StatusCode::OK, &said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_networks_are_told_from_others() {
        for good in [
            "example.org",
            "*.example.org",
            "a",
            "x-1.y_2.z",
            "localhost",
        ] {
            assert!(is_domain(good), "{good}");
        }
        for bad in ["", "*", "a..b", "a b", "http://x", "é.org", "*.*.x"] {
            assert!(!is_domain(bad), "{bad}");
        }
        for good in ["10.0.0.0/8", "1.2.3.4", "::/0", "2001:db8::/32"] {
            assert!(is_network(good), "{good}");
        }
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "x/8", "1.2.3.4/"] {
            assert!(!is_network(bad), "{bad}");
        }
    }
}
