//! Changes as they happen, by inotify.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use thaw_wire::message::{FileChange, FileEvent};

use super::{About, Failure};

/// Most directories below a watched one; more are not seen into, which is told as an overflow.
const MOST_DIRECTORIES: usize = 8192;

/// What is asked for.
fn wanted() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ATTRIB
}

struct Watcher {
    inotify: Inotify,
    watched: HashMap<WatchDescriptor, PathBuf>,
    recursive: bool,
    /// What is watched itself, rather than for being below it.
    top: Option<WatchDescriptor>,
}

/// Tells of changes until standard output is closed or what is watched is gone.
pub(super) fn watch(path: &str, recursive: bool) -> Result<(), Failure> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).about(path)?;
    let mut watcher = Watcher {
        inotify,
        watched: HashMap::new(),
        recursive,
        top: None,
    };
    watcher.top = Some(watcher.add(Path::new(path), wanted()).about(path)?);
    let mut news = Vec::new();
    watcher.descend(Path::new(path), false, &mut news);
    say(&["{}".into()]).about(path)?;
    tell(&news).about(path)?;
    while watcher.wait().about(path)? {
        let events = watcher.inotify.read_events().about(path)?;
        let mut news = Vec::new();
        let mut is_over = false;
        for event in events {
            let gone = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
            is_over |= watcher.top == Some(event.wd) && event.mask.intersects(gone);
            watcher.note(event, &mut news);
        }
        news.dedup();
        tell(&news).about(path)?;
        if is_over {
            break;
        }
    }
    Ok(())
}

impl Watcher {
    /// Waits for news; false when nobody wants to hear them.
    fn wait(&self) -> io::Result<bool> {
        let out = io::stdout();
        loop {
            let mut fds = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                // Asked for nothing, it still tells of a reader that is gone.
                PollFd::new(out.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[1].any().unwrap_or(true) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn add(&mut self, path: &Path, wanted: AddWatchFlags) -> io::Result<WatchDescriptor> {
        let descriptor = self.inotify.add_watch(path, wanted)?;
        self.watched.insert(descriptor, path.to_owned());
        Ok(descriptor)
    }

    /// Watches a directory below; false when it cannot be.
    fn add_below(&mut self, path: &Path) -> bool {
        // It may have become a link meanwhile, to anywhere.
        let wanted = wanted() | AddWatchFlags::IN_ONLYDIR | AddWatchFlags::IN_DONT_FOLLOW;
        self.watched.len() < MOST_DIRECTORIES && self.add(path, wanted).is_ok()
    }

    /// Forgets a directory that went elsewhere, and what is below it: its name is wrong now. If it is
    /// still below what is watched it is found again under its new one.
    fn forget(&mut self, directory: &Path) {
        let inotify = &self.inotify;
        self.watched.retain(|descriptor, path| {
            let stays = !path.starts_with(directory);
            if !stays {
                // One that is removed already is no longer watched either.
                inotify.rm_watch(*descriptor).unwrap_or_default();
            }
            stays
        });
    }

    /// Watches what is below a directory, too. In one that is new, what is there already was made
    /// before anybody watched, and is told of now.
    fn descend(&mut self, directory: &Path, is_new: bool, news: &mut Vec<FileEvent>) {
        if !self.recursive {
            return;
        }
        let Ok(entries) = fs::read_dir(directory) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if is_new {
                news.push(event(FileChange::Created, &path));
            }
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if !self.add_below(&path) {
                news.push(event(FileChange::Overflow, &path));
                continue;
            }
            self.descend(&path, is_new, news);
        }
    }

    fn note(&mut self, happened: InotifyEvent, news: &mut Vec<FileEvent>) {
        let mask = happened.mask;
        if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            news.push(event(FileChange::Overflow, Path::new("")));
            return;
        }
        if mask.contains(AddWatchFlags::IN_IGNORED) {
            self.watched.remove(&happened.wd);
            return;
        }
        let Some(directory) = self.watched.get(&happened.wd) else {
            return;
        };
        let itself = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
        if mask.intersects(itself) && self.top != Some(happened.wd) {
            return; // the directory above tells that, in its place
        }
        let path = match &happened.name {
            Some(name) => directory.join(name),
            None => directory.clone(),
        };
        let made = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        let gone = AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVE_SELF;
        let change = match mask {
            _ if mask.intersects(made) => FileChange::Created,
            _ if mask.intersects(gone) => FileChange::Removed,
            _ if mask.contains(AddWatchFlags::IN_MODIFY) => FileChange::Modified,
            _ => FileChange::Attributes,
        };
        news.push(event(change, &path));
        if mask.contains(AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_ISDIR) {
            self.forget(&path);
        }
        if change == FileChange::Created && mask.contains(AddWatchFlags::IN_ISDIR) && self.recursive
        {
            if !self.add_below(&path) {
                news.push(event(FileChange::Overflow, &path));
                return;
            }
            self.descend(&path, true, news);
        }
    }
}

fn event(event: FileChange, path: &Path) -> FileEvent {
    FileEvent {
        event,
        path: path.to_string_lossy().into_owned(),
    }
}

fn tell(news: &[FileEvent]) -> io::Result<()> {
    let lines = news.iter().map(serde_json::to_string);
    say(&lines.collect::<Result<Vec<_>, _>>()?)
}

fn say(lines: &[String]) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    out.write_all((lines.join("\n") + "\n").as_bytes())?;
    out.flush()
}
