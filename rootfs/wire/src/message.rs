//! JSON bodies of frames. Unknown fields are ignored, so either end may grow one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What the host tells the agent on the control stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Become a new individual; answered by [`Report::Renewed`] or [`Report::Failed`].
    Renew(Renew),
    /// Start the runner and import these Python modules; answered by [`Report::Warmed`] or
    /// [`Report::Failed`]. Only while a template is built.
    Warm {
        /// Module names for the runner to import.
        modules: Vec<String>,
    },
    /// Flush file systems and hold still, because the VM is about to be frozen; answered by
    /// [`Report::Quiet`].
    Quiesce,
    /// Answered by [`Report::Pong`] with the same number.
    Ping {
        /// Any number.
        token: u64,
    },
}

/// What makes a restored VM an individual. See the design's "after every restore".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Renew {
    /// The VM's generation, never reused by this host.
    pub generation: u64,
    /// 32 bytes from the host's random generator, as 64 hexadecimal digits.
    pub seed: String,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
    /// The guest's host name, at most 63 bytes of `[a-z0-9-]`.
    pub hostname: String,
    /// 32 hexadecimal digits for `/etc/machine-id`.
    pub machine_id: String,
    /// The session's environment variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// What the agent tells the host on the control stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// First frame after every handshake.
    Ready(Ready),
    /// The order to renew was carried out in full.
    Renewed {
        /// The generation that was ordered.
        generation: u64,
        /// The guest's wall clock after the step, nanoseconds since the Unix epoch.
        wall_ns: u64,
        /// 16 bytes that the reseeded kernel generator gave, hexadecimal: proof, never secret.
        sample: String,
    },
    /// The runner is up and the modules are imported.
    Warmed {
        /// Modules that the image lacks, with the reason.
        missing: BTreeMap<String, String>,
    },
    /// File systems are flushed and nothing but the agent runs.
    Quiet,
    /// Answer to a ping.
    Pong {
        /// The ping's number.
        token: u64,
    },
    /// An order could not be carried out.
    Failed {
        /// Which order, by its tag.
        order: String,
        /// Why, for the host's log.
        reason: String,
    },
}

/// Who is at the guest's end of the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// The generation read from the header page.
    pub generation: u64,
    /// The agent's version.
    pub agent: String,
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Languages that this image can run.
    pub languages: Vec<Language>,
    /// Whether the warm runner is up.
    pub warm: bool,
}

/// A language that commands come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// The warm interpreter, with IPython's conveniences.
    #[default]
    Python,
    /// A persistent shell.
    Bash,
    /// Node.js, where the image has it.
    Javascript,
}

/// What a new stream is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "open", rename_all = "snake_case")]
pub enum Open {
    /// Run a command in a session's interpreter or shell.
    Execute(Execute),
}

/// One command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Execute {
    /// The command's language.
    pub language: Language,
    /// Length in bytes of the source text, which follows as [`crate::frame::Kind::Stdin`] frames
    /// when `code` is absent.
    #[serde(default)]
    pub code_len: u64,
    /// The source text, when it fits the frame.
    #[serde(default)]
    pub code: Option<String>,
    /// Interrupt the command after this many milliseconds. The host enforces its own, later, deadline.
    pub timeout_ms: u64,
    /// Environment variables for this command only.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// How a command ended. A stream's last frame.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 for success, 1 for a Python exception, the process's own status, 128 + N for signal N,
    /// 124 when the deadline passed.
    pub exit_code: i32,
    /// The deadline passed and the command was interrupted.
    #[serde(default)]
    pub timed_out: bool,
    /// Processor time of the command and its children, microseconds.
    #[serde(default)]
    pub cpu_us: u64,
    /// Time from start to end in the guest, microseconds.
    #[serde(default)]
    pub wall_us: u64,
    /// The interpreter died with the command and a fresh one takes its place: state is lost.
    #[serde(default)]
    pub state_lost: bool,
    /// What the agent has to say about it, for the user.
    #[serde(default)]
    pub note: Option<String>,
}

/// A value that the last expression produced, beyond its text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RichResult {
    /// Representations by MIME type; binary ones in base64.
    pub data: BTreeMap<String, String>,
}

/// A signal for a running command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "signal", rename_all = "snake_case")]
pub enum Signal {
    /// SIGINT: `KeyboardInterrupt` in Python.
    Interrupt,
    /// SIGKILL to the command's process group.
    Kill,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_have_a_stable_shape() {
        let json = serde_json::to_string(&Order::Ping { token: 7 }).unwrap();
        assert_eq!(json, r#"{"order":"ping","token":7}"#);
    }

    #[test]
    fn absent_fields_take_their_defaults() {
        let exit: Exit = serde_json::from_str(r#"{"exit_code":3,"later_field":1}"#).unwrap();
        assert_eq!(
            exit,
            Exit {
                exit_code: 3,
                ..Exit::default()
            }
        );
    }
}
