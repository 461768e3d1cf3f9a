//! The endpoints: lists, one for each resource, from which requests are routed and the OpenAPI
//! document is made.

pub(super) mod absent;
mod account;
mod api_keys;
mod audit;
mod egress;
mod execute;
mod executions;
mod files;
mod pty;
mod sandboxes;
mod sessions;
mod snapshots;
mod ssh_keys;
mod system;
mod tapes;
mod vm_actions;
mod vms;

use futures_util::future::BoxFuture;
use serde_json::Value;

use super::app::Call;
use super::body::fields::Fields;
use super::error::ApiError;
use super::reply::Reply;

/// Answers one call.
pub type Handler = fn(Call) -> BoxFuture<'static, Result<Reply, ApiError>>;

/// What an endpoint reads as its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Nothing.
    Nothing,
    /// JSON of this schema.
    Json(&'static str),
    /// JSON of this schema, or nothing at all.
    OptionalJson(&'static str),
    /// A form of this schema.
    Form(&'static str),
    /// A multipart form of this schema.
    Multipart(&'static str),
    /// Bytes.
    Bytes,
}

/// Who may call an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    Open,
    /// Who has a key or token.
    Key,
    /// Who has a key or token, in the head or in the body.
    KeyOrBody,
}

/// A query parameter.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub kind: QueryKind,
    /// What it is for.
    pub help: &'static str,
}

/// What a query parameter may be.
#[derive(Clone, Copy, Debug)]
pub enum QueryKind {
    /// Any text, which must be there.
    Required,
    /// Any text.
    Text,
    /// `true` or `false`; absent, this.
    Flag(bool),
    /// A number between two, both included; absent, the first.
    Int(i64, i64, i64),
}

/// One endpoint.
#[derive(Debug)]
pub struct Endpoint {
    /// `GET`, `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: &'static str,
    /// With parameters in braces.
    pub path: &'static str,
    /// Its name in the OpenAPI document.
    pub name: &'static str,
    /// What it is for.
    pub summary: &'static str,
    /// Who may call it.
    pub access: Access,
    /// Its query parameters.
    pub query: &'static [Query],
    /// Its body.
    pub takes: Takes,
    /// The schema of its 200 reply, or a media type when it is not JSON; empty when it never has one.
    pub gives: &'static str,
    /// Statuses beyond those that follow from its access and body (401, 429; 400, 408, 413, 422).
    pub refuses: &'static [u16],
    /// What answers it.
    pub handler: Handler,
}

/// The endpoints of one resource, and the schemas of what they take and give.
#[derive(Debug)]
pub struct Group {
    /// Its endpoints.
    pub endpoints: &'static [Endpoint],
    /// Names and schemas.
    pub schemas: fn() -> Vec<(&'static str, Value)>,
}

/// Every resource.
pub const GROUPS: &[Group] = &[
    execute::GROUP,
    executions::GROUP,
    files::GROUP,
    pty::GROUP,
    pty::VM_GROUP,
    sessions::GROUP,
    sandboxes::GROUP,
    vms::GROUP,
    vm_actions::GROUP,
    snapshots::GROUP,
    tapes::GROUP,
    account::GROUP,
    api_keys::GROUP,
    ssh_keys::GROUP,
    egress::GROUP,
    audit::GROUP,
    absent::GROUP,
    system::GROUP,
];

/// Most characters of a name that a client gives something.
const MOST_NAME: usize = 200;

/// A name that a client may give something: short and without control characters.
fn name_field(fields: &mut Fields<'_>, field: &str) -> Option<String> {
    let name = fields.optional_string(field)?;
    if name.chars().count() > MOST_NAME || name.chars().any(char::is_control) {
        let why = "a name has at most 200 characters and no control characters";
        fields.value_error(&[field], why);
    }
    Some(name).filter(|name| !name.is_empty())
}

/// Every endpoint.
pub fn endpoints() -> impl Iterator<Item = &'static Endpoint> {
    GROUPS.iter().flat_map(|group| group.endpoints)
}
