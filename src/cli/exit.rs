//! Exit codes, so that scripts can tell failures apart.

use std::process::ExitCode;

/// What `thaw --help` says about them. Code 2 is the argument parser's own.
pub const HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 wrong configuration, 4 unusable data directory,
5 no usable image or template, 6 unusable address or certificate. `thaw exec` ends with the
command's own code, 124 when it timed out, 125 when it could not be run at all.";

/// Anything without a code of its own.
pub const FAILED: u8 = 1;
/// The configuration is wrong.
pub const CONFIG: u8 = 3;
/// The data directory cannot be used: rights, another server, a newer database.
pub const DATA_DIR: u8 = 4;
/// No image, or no template can be made of it.
pub const IMAGE: u8 = 5;
/// The address cannot be bound, or its certificate cannot be used.
pub const BIND: u8 = 6;
/// `thaw exec`: the command was not run.
pub const NOT_RUN: u8 = 125;

#[derive(Debug, thiserror::Error)]
#[error("{source:#}")]
struct WithCode {
    code: u8,
    source: anyhow::Error,
}

/// Gives an error the exit code that it ends the process with.
pub fn with(code: u8, error: impl Into<anyhow::Error>) -> anyhow::Error {
    WithCode {
        code,
        source: error.into(),
    }
    .into()
}

/// The exit code of an error.
pub fn code(error: &anyhow::Error) -> ExitCode {
    let with_code = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<WithCode>());
    ExitCode::from(with_code.map_or(FAILED, |found| found.code))
}

/// An error as it is shown, without repeating what its codes wrap.
pub fn message(error: &anyhow::Error) -> String {
    match error.downcast_ref::<WithCode>() {
        Some(with_code) => format!("{:#}", with_code.source),
        None => format!("{error:#}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_survives_context_and_the_message_is_not_repeated() {
        let error = with(CONFIG, anyhow::anyhow!("inner").context("outer"));
        assert_eq!(message(&error), "outer: inner");
        let error = error.context("more");
        assert_eq!(
            format!("{:?}", code(&error)),
            format!("{:?}", ExitCode::from(CONFIG))
        );
        assert_eq!(
            format!("{:?}", code(&anyhow::anyhow!("x"))),
            format!("{:?}", ExitCode::from(FAILED))
        );
    }
}
