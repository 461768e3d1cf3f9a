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
    /// Names of terminals from before that the host will attach to again; all others are hung up.
    #[serde(default)]
    pub terminals: Vec<String>,
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
    /// Start a process of its own: a terminal, or work on files.
    Process(Process),
    /// Go on with a terminal that was named, started under an earlier generation and kept by the renewal.
    Attach(Attach),
}

/// A terminal to go on with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attach {
    /// Its [`Process::name`].
    pub name: String,
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
    /// Which of the session's interpreters of this language: each name has variables of its own.
    /// Absent: the one that every session has from its start.
    #[serde(default)]
    pub context: Option<String>,
    /// Somebody watches: what it prints is to leave the interpreter as it is printed, not when a
    /// buffer is full or its owner gets round to it.
    #[serde(default)]
    pub live: bool,
}

/// A process with a stream of its own, beside whatever commands run.
///
/// [`crate::frame::Kind::Stdin`] frames are its input, as far as the agent grants credit; an empty
/// one is the input's end. What it writes comes as [`crate::frame::Kind::Stdout`] and
/// [`crate::frame::Kind::Stderr`], its end as [`crate::frame::Kind::Exit`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// What runs.
    pub program: Program,
    /// Environment variables beside the session's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it starts; absent: where commands do.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Runs on a terminal of this size: input and output are the terminal's, and all output
    /// comes as standard output.
    #[serde(default)]
    pub terminal: Option<Size>,
    /// What a terminal is attached to by after a restore; one without is hung up then.
    #[serde(default)]
    pub name: Option<String>,
}

/// What a [`Process`] runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "program", rename_all = "snake_case")]
pub enum Program {
    /// A program and its arguments, the program looked for in `PATH`.
    Command {
        /// At least one word.
        argv: Vec<String>,
    },
    /// The agent's own work on files, in a process of its own. Exit code 0, or the system's error
    /// number with a text on standard error; 255 for what has no number.
    Files {
        /// What to do.
        work: FileWork,
    },
}

/// Work on a guest's files. Paths are absolute, or relative to where commands start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "snake_case")]
pub enum FileWork {
    /// The file's bytes, on standard output.
    Read {
        /// A regular file.
        path: String,
    },
    /// Standard input becomes the file's contents: written beside it, synced by the rename at the
    /// input's end, so that nobody sees half of it. Without an end of input nothing is left.
    Write {
        /// The file; one that is there is replaced.
        path: String,
        /// Permission bits; absent: those of the file there is, else 0644.
        #[serde(default)]
        mode: Option<u32>,
        /// Make missing directories above it.
        #[serde(default)]
        parents: bool,
    },
    /// JSON lines of [`FileInfo`], on standard output, sorted by path.
    List {
        /// A directory.
        path: String,
        /// What is below its directories, too.
        #[serde(default)]
        recursive: bool,
        /// Most lines.
        limit: u64,
    },
    /// What was made or changed since, in every file system of the guest's own: JSON lines of [`FileInfo`], then one of
    /// [`Looked`].
    Changed {
        /// The guest's clock, nanoseconds since the Unix epoch.
        since_ns: u64,
        /// Most lines; the rest is counted.
        limit: u64,
    },
    /// One JSON line of [`FileInfo`].
    Stat {
        /// Anything; a symbolic link is not followed.
        path: String,
    },
    /// Makes a directory.
    Mkdir {
        /// The directory.
        path: String,
        /// Make missing ones above it, and be content with one that is there.
        #[serde(default)]
        parents: bool,
    },
    /// Removes a file or an empty directory.
    Remove {
        /// What goes; never the root.
        path: String,
        /// A directory with everything in it.
        #[serde(default)]
        recursive: bool,
    },
    /// Renames, replacing a file that is there.
    Rename {
        /// What it is called now.
        from: String,
        /// What it is to be called.
        to: String,
    },
    /// JSON lines of [`FileEvent`] until the stream is killed. The first line, `{}`, says that from
    /// now on nothing is missed.
    Watch {
        /// A file or directory.
        path: String,
        /// What is below its directories, too, also those made later.
        #[serde(default)]
        recursive: bool,
    },
}

/// The last line of [`FileWork::Changed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looked {
    /// The guest's clock when it began to look: to be asked since, the next time.
    pub now_ns: u64,
    /// What was changed and is not in the list.
    pub more: u64,
}

/// What can be told about a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileInfo {
    /// As it was asked for; in a list, below the path that was asked for.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, seconds since the Unix epoch.
    pub modified: f64,
    /// Where a symbolic link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Kinds of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, pipe or socket.
    Other,
}

/// Something that happened to a file. Names are not always UTF-8; what is not is replaced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEvent {
    /// What happened.
    pub event: FileChange,
    /// To whom.
    pub path: String,
}

/// What can happen to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileChange {
    /// It was made, or moved here.
    Created,
    /// Its contents changed.
    Modified,
    /// It was removed, or moved away.
    Removed,
    /// Its owner, mode or times changed.
    Attributes,
    /// More happened than could be told: look for yourself.
    Overflow,
}

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
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

/// A value that a command produced, beyond its text: the last expression's, or one that was
/// displayed. All of a command's, as one JSON array, travel in pieces in
/// [`crate::frame::Kind::Rich`] frames, and are whole when the command's last frame comes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RichResult {
    /// Representations by MIME type: text, binary ones in base64, `application/json` as JSON.
    pub data: BTreeMap<String, serde_json::Value>,
}

/// A signal for a running command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "signal", rename_all = "snake_case")]
pub enum Signal {
    /// SIGINT: `KeyboardInterrupt` in Python.
    Interrupt,
    /// SIGKILL to the command's process group.
    Kill,
    /// SIGHUP to the process group, as when a terminal is closed.
    Hangup,
    /// The terminal has another size now.
    Resize(Size),
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
