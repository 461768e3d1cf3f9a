//! `/v1/tapes` and `/v1/sessions/{id}/tape/…`: recorded sessions, gone back in and branched from.

mod handlers;
mod schemas;

use super::{Access, Endpoint, Group, Query, QueryKind, Takes};
use handlers::{
    append, branch, delete, diff, events, export, get, lanes, list, rewind, start, stop,
};

/// Events that one call gives at most; an export gives as many.
const MOST_EVENTS: i64 = 10_000;

/// Largest number of a step.
const STEP: i64 = 1 << 40;

/// What this file answers.
pub(super) const GROUP: Group = Group {
    endpoints: &[
        Endpoint {
            method: "POST",
            path: "/v1/sessions/{session_id}/tape/start",
            name: "start_tape",
            summary: "Record a session: a checkpoint before every command; goes on with the tape that runs",
            access: Access::Key,
            query: &[],
            takes: Takes::OptionalJson("TapeRequest"),
            gives: "Tape",
            refuses: &[404, 409],
            handler: |call| Box::pin(start(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes",
            name: "list_tapes",
            summary: "Tapes, newest first",
            access: Access::Key,
            query: &[
                Query {
                    name: "session_id",
                    kind: QueryKind::Text,
                    help: "Of this session",
                },
                Query {
                    name: "vm_id",
                    kind: QueryKind::Text,
                    help: "Of this VM",
                },
                Query {
                    name: "status",
                    kind: QueryKind::Text,
                    help: "`recording` or `stopped`",
                },
                Query {
                    name: "limit",
                    kind: QueryKind::Int(50, 1, 200),
                    help: "At most so many",
                },
                Query {
                    name: "offset",
                    kind: QueryKind::Int(0, 0, STEP),
                    help: "After so many",
                },
            ],
            takes: Takes::Nothing,
            gives: "Tapes",
            refuses: &[],
            handler: |call| Box::pin(list(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}",
            name: "get_tape",
            summary: "One tape",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Tape",
            refuses: &[404],
            handler: |call| Box::pin(get(call)),
        },
        Endpoint {
            method: "DELETE",
            path: "/v1/tapes/{tape_id}",
            name: "delete_tape",
            summary: "Remove a tape with its checkpoints; its session goes on",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "TapeDeleted",
            refuses: &[404],
            handler: |call| Box::pin(delete(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/stop",
            name: "stop_tape",
            summary: "Stop recording; what is recorded stays",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "Tape",
            refuses: &[404],
            handler: |call| Box::pin(stop(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/events",
            name: "tape_events",
            summary: "What is on a tape, step by step",
            access: Access::Key,
            query: &[
                Query {
                    name: "after_step",
                    kind: QueryKind::Int(0, 0, STEP),
                    help: "After this step",
                },
                Query {
                    name: "kind",
                    kind: QueryKind::Text,
                    help: "Of this kind",
                },
                Query {
                    name: "limit",
                    kind: QueryKind::Int(200, 1, MOST_EVENTS),
                    help: "At most so many",
                },
            ],
            takes: Takes::Nothing,
            gives: "TapeEvents",
            refuses: &[404],
            handler: |call| Box::pin(events(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/events",
            name: "append_tape_event",
            summary: "Put something of the client's own on a tape",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("TapeEventRequest"),
            gives: "TapeAppended",
            refuses: &[404, 409],
            handler: |call| Box::pin(append(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/lanes",
            name: "tape_lanes",
            summary: "How many events there are of each kind",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "TapeLanes",
            refuses: &[404],
            handler: |call| Box::pin(lanes(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/export",
            name: "export_tape",
            summary: "A tape with its events as one JSON object",
            access: Access::Key,
            query: &[],
            takes: Takes::Nothing,
            gives: "TapeExport",
            refuses: &[404],
            handler: |call| Box::pin(export(call)),
        },
        Endpoint {
            method: "GET",
            path: "/v1/tapes/{tape_id}/diff",
            name: "diff_tape",
            summary: "Files that differ between the moments before two steps; one step beyond the last is now",
            access: Access::Key,
            query: &[
                Query {
                    name: "from",
                    kind: QueryKind::Int(1, 1, STEP),
                    help: "The first step",
                },
                Query {
                    name: "to",
                    kind: QueryKind::Int(1, 1, STEP),
                    help: "The second step",
                },
            ],
            takes: Takes::Nothing,
            gives: "TapeDiff",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(diff(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/branch",
            name: "branch_tape",
            summary: "A new session that begins at the moment before a step, and is recorded in its turn",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("TapeBranchRequest"),
            gives: "TapeBranch",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(branch(call)),
        },
        Endpoint {
            method: "POST",
            path: "/v1/tapes/{tape_id}/rewind",
            name: "rewind_tape",
            summary: "Take the session itself back to the moment before a step; what it is now becomes a step",
            access: Access::Key,
            query: &[],
            takes: Takes::Json("TapeRewindRequest"),
            gives: "TapeRewound",
            refuses: &[404, 409, 503],
            handler: |call| Box::pin(rewind(call)),
        },
    ],
    schemas: schemas::schemas,
};
