//! Telling a person how far a long job is: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Steps of a job, announced as they begin.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    step: u64,
    steps: u64,
    started: Instant,
    quiet: bool,
}

impl Progress {
    /// A job of `steps` steps, told on standard error.
    pub fn new(steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(
                "{spinner} [{bar:24}] {pos}/{len} {elapsed} {wide_msg}",
            ) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            step: 0,
            steps,
            started: Instant::now(),
            quiet: false,
        }
    }

    /// A job that tells nothing.
    pub fn quiet() -> Self {
        Self {
            bar: None,
            step: 0,
            steps: 0,
            started: Instant::now(),
            quiet: true,
        }
    }

    /// A step begins.
    pub fn step(&mut self, what: &str) {
        self.step += 1;
        if let Some(bar) = &self.bar {
            bar.set_position(self.step - 1);
            bar.set_message(what.to_owned());
        } else if !self.quiet {
            eprintln!(
                "[{}/{} {:5.1} s] {what}",
                self.step,
                self.steps,
                self.started.elapsed().as_secs_f64()
            );
        }
    }

    /// Something worth a line of its own.
    pub fn note(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.println(what);
        } else if !self.quiet {
            eprintln!("{what}");
        }
    }

    /// What the step is doing right now; only terminals show it.
    pub fn detail(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// Seconds since the job began.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
