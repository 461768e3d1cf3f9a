//! A session's files: `/upload` and `/download` as the API has them, and `/v1/sessions/{id}/files…`.

mod run;
mod transfer;
mod tree;
mod upload;
mod watch;

pub(super) use run::session_id;
use serde_json::json;

use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use crate::http::openapi::{array, nullable, object, text, truth, uuid};

const PATH: Query = Query {
    name: "path",
    kind: QueryKind::Required,
    help: "Absolute, or relative to the session's home",
};

/// Most lines of a list: what a person or a program still looks through, and some megabytes.
const MOST_LISTED: i64 = 10_000;

/// Statuses of everything that has to do with a guest's file system.
const REFUSES: &[u16] = &[400, 403, 404, 409, 413, 503];

/// What these files answer.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/upload",
            name: "upload_file",
            summary: "Write a file into a session's VM; all of it or nothing is there afterwards",
            access: Access::Key,
            query: &[],
            takes: Takes::Multipart("UploadForm"),
            gives: "Written",
            refuses: REFUSES,
            handler: |call| Box::pin(upload::upload(call)),
        },
        Endpoint {
            method: "POST",
            path: "/download",
            name: "download_file",
            summary: "Fetch a file from a session's VM, in base64",
            access: Access::Key,
            query: &[],
            takes: Takes::Form("DownloadForm"),
            gives: "Download",
            refuses: REFUSES,
            handler: |call| Box::pin(transfer::download(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/{session_id}/files",
            name: "read_file",
            summary: "Fetch a file's bytes",
            access: Access::Key,
            query: &[PATH],
            takes: Takes::Nothing,
            gives: "application/octet-stream",
            refuses: REFUSES,
            handler: |call| Box::pin(transfer::read(call)),
        },
        Endpoint {
            method: "PUT",
            path: "/v1/sessions/{session_id}/files",
            name: "write_file",
            summary: "Write a file from the request's bytes; all of it or nothing is there afterwards",
            access: Access::Key,
            query: &[
                PATH,
                Query {
                    name: "mode",
                    kind: QueryKind::Text,
                    help: "Permission bits in octal; absent, those of the file there is, else 644",
                },
                Query {
                    name: "parents",
                    kind: QueryKind::Flag(false),
                    help: "Make missing directories above it",
                },
            ],
            takes: Takes::Bytes,
            gives: "Written",
            refuses: REFUSES,
            handler: |call| Box::pin(transfer::write(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/sessions/{session_id}/files",
            name: "remove_file",
            summary: "Remove a file or directory",
            access: Access::Key,
            query: &[
                PATH,
                Query {
                    name: "recursive",
                    kind: QueryKind::Flag(false),
                    help: "A directory with everything in it",
                },
            ],
            takes: Takes::Nothing,
            gives: "Done",
            refuses: REFUSES,
            handler: |call| Box::pin(tree::remove(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/{session_id}/files/list",
            name: "list_files",
            summary: "What a directory holds",
            access: Access::Key,
            query: &[
                PATH,
                Query {
                    name: "recursive",
                    kind: QueryKind::Flag(false),
                    help: "What is below its directories, too",
                },
                Query {
                    name: "limit",
                    kind: QueryKind::Int(1000, 1, MOST_LISTED),
                    help: "Most entries",
                },
            ],
            takes: Takes::Nothing,
            gives: "FileList",
            refuses: REFUSES,
            handler: |call| Box::pin(tree::list(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/{session_id}/files/stat",
            name: "stat_file",
            summary: "What can be told about a file",
            access: Access::Key,
            query: &[PATH],
            takes: Takes::Nothing,
            gives: "FileInfo",
            refuses: REFUSES,
            handler: |call| Box::pin(tree::stat(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/sessions/{session_id}/files/mkdir",
            name: "make_directory",
            summary: "Make a directory",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("MkdirRequest"),
            gives: "Done",
            refuses: REFUSES,
            handler: |call| Box::pin(tree::mkdir(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/sessions/{session_id}/files/rename",
            name: "rename_file",
            summary: "Rename a file or directory, replacing a file that is there",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("RenameRequest"),
            gives: "Done",
            refuses: REFUSES,
            handler: |call| Box::pin(tree::rename(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/sessions/{session_id}/files/watch",
            name: "watch_files",
            summary: "Follow changes: server-sent events `ready`, `created`, `modified`, `removed`, `attributes`, `overflow`, `end`",
            access: Access::Key,
            query: &[
                PATH,
                Query {
                    name: "recursive",
                    kind: QueryKind::Flag(false),
                    help: "What is below its directories, too",
                },
            ],
            takes: Takes::Nothing,
            gives: "text/event-stream",
            refuses: REFUSES,
            handler: |call| Box::pin(watch::watch(call)),
        },
    ],
    schemas: || {
        vec![
            (
                "UploadForm",
                object(
                    &["remote_path", "session_id", "file"],
                    json!({
                        "remote_path": text(), "session_id": uuid(), "recursive": text(),
                        "file": { "type": "string", "contentMediaType": "application/octet-stream" },
                    }),
                ),
            ),
            (
                "DownloadForm",
                object(
                    &["filename", "session_id"],
                    json!({ "filename": text(), "session_id": uuid() }),
                ),
            ),
            (
                "Written",
                object(
                    &["success", "path", "size"],
                    json!({ "success": truth(), "path": text(), "size": { "type": "integer" } }),
                ),
            ),
            (
                "Download",
                object(
                    &["content", "filename", "size"],
                    json!({
                        "filename": text(), "size": { "type": "integer" },
                        "content": { "type": "string", "contentEncoding": "base64" },
                    }),
                ),
            ),
            (
                "FileInfo",
                object(
                    &["path", "kind", "size"],
                    json!({
                        "path": text(),
                        "kind": { "type": "string", "enum": ["file", "directory", "symlink", "other"] },
                        "size": { "type": "integer" }, "mode": { "type": "integer" },
                        "uid": { "type": "integer" }, "gid": { "type": "integer" },
                        "modified": { "type": "number", "description": "Seconds since the Unix epoch" },
                        "target": nullable("string"),
                    }),
                ),
            ),
            (
                "FileList",
                object(
                    &["entries", "truncated"],
                    json!({ "entries": array("FileInfo"), "truncated": truth() }),
                ),
            ),
            (
                "MkdirRequest",
                object(&["path"], json!({ "path": text(), "parents": truth() })),
            ),
            (
                "RenameRequest",
                object(&["from", "to"], json!({ "from": text(), "to": text() })),
            ),
            ("Done", object(&["success"], json!({ "success": truth() }))),
        ]
    },
};
