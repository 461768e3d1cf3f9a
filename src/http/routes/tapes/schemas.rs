//! What tapes' endpoints take and give.

use serde_json::{Value, json};

use super::STEP;
use crate::http::openapi::{array, nullable, object, text, time, truth};

pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    let step = || json!({ "type": "integer", "minimum": 1, "maximum": STEP });
    let number = || json!({ "type": "integer" });
    vec![
        (
            "TapeRequest",
            object(
                &[],
                json!({
                    "record_egress_content": nullable("boolean"), "record_fs": nullable("boolean"),
                    "retention_days": { "type": "integer", "minimum": 1, "maximum": 365, "default": 7 },
                }),
            ),
        ),
        (
            "Tape",
            object(
                &["id", "status", "session_id", "total_steps"],
                json!({
                    "id": text(), "tape_id": text(), "status": text(), "session_id": text(),
                    "vm_id": nullable("string"), "total_steps": number(), "created_at": time(),
                    "stopped_at": nullable("string"), "expires_at": time(), "record_fs": truth(),
                    "record_egress_content": truth(), "parent_tape_id": nullable("string"),
                    "parent_step_id": nullable("integer"),
                }),
            ),
        ),
        ("Tapes", array("Tape")),
        (
            "TapeDeleted",
            object(
                &["success", "id"],
                json!({ "success": truth(), "id": text() }),
            ),
        ),
        (
            "TapeEvent",
            object(
                &["step_id", "kind", "ts", "payload"],
                json!({
                    "step_id": number(), "kind": text(), "ts": time(), "payload": { "type": "object" },
                    "checkpoint_id": nullable("string"),
                }),
            ),
        ),
        ("TapeEvents", array("TapeEvent")),
        (
            "TapeEventRequest",
            object(
                &["kind"],
                json!({
                    "kind": text(), "payload": nullable("object"), "step_id": nullable("integer"),
                    "parent_step_id": nullable("integer"), "checkpoint_id": nullable("string"),
                }),
            ),
        ),
        (
            "TapeAppended",
            object(
                &["step_id"],
                json!({ "tape_id": text(), "step_id": number() }),
            ),
        ),
        (
            "TapeLanes",
            object(
                &["lanes"],
                json!({ "lanes": { "type": "object", "additionalProperties": number() } }),
            ),
        ),
        (
            "TapeExport",
            object(
                &["format", "events"],
                json!({
                    "format": text(), "tape": { "$ref": "#/components/schemas/Tape" },
                    "events": array("TapeEvent"), "truncated": truth(),
                }),
            ),
        ),
        (
            "TapeDiff",
            object(
                &["changed_paths", "mode"],
                json!({
                    "tape_id": text(), "from_step": number(), "to_step": number(), "mode": text(),
                    "changed_paths": { "type": "array", "items": text() },
                    "changes": { "type": "array", "items": { "type": "object" } },
                }),
            ),
        ),
        (
            "TapeBranchRequest",
            object(
                &["at_step"],
                json!({
                    "at_step": step(),
                    "mode": { "type": "string", "enum": ["live", "replay"], "default": "live" },
                }),
            ),
        ),
        (
            "TapeBranch",
            object(
                &[
                    "tape_id",
                    "parent_tape_id",
                    "parent_step_id",
                    "status",
                    "vm_id",
                ],
                json!({
                    "tape_id": text(), "parent_tape_id": text(), "parent_step_id": number(), "status": text(),
                    "vm_id": text(), "session_id": text(),
                }),
            ),
        ),
        (
            "TapeRewindRequest",
            object(&["to_step"], json!({ "to_step": step() })),
        ),
        (
            "TapeRewound",
            object(
                &["tape_id", "to_step", "step_id", "vm_id", "session_id"],
                json!({
                    "tape_id": text(), "to_step": number(), "vm_id": text(), "session_id": text(),
                    "step_id": { "type": "integer", "description": "The step before which the session was as it was just now" },
                }),
            ),
        ),
    ]
}
