//! The guest's files that the `thaw` binary carries: recipes and the runner.

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
