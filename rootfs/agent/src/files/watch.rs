//! Changes as they happen, by inotify.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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
}

/// Tells of changes until standard output is closed or what is watched is gone.
pub(super) fn watch(path: &str, recursive: bool) -> Result<(), Failure> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).about(path)?;
    let mut watcher = Watcher {
        inotify,
        watched: HashMap::new(),
        recursive,
    };
    let top = watcher.add(Path::new(path)).about(path)?;
    let mut news = Vec::new();
    watcher.descend(Path::new(path), false, &mut news);
    say(&["{}".into()]).about(path)?;
    tell(&news).about(path)?;
    loop {
        let events = watcher.inotify.read_events().about(path)?;
        let mut news = Vec::new();
        let mut is_over = false;
        for event in events {
            let gone = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
            is_over |= event.wd == top && event.mask.intersects(gone);
            watcher.note(event, &mut news);
        }
        news.dedup();
        tell(&news).about(path)?;
        if is_over {
            return Ok(());
        }
    }
}

impl Watcher {
    fn add(&mut self, path: &Path) -> io::Result<WatchDescriptor> {
        let descriptor = self.inotify.add_watch(path, wanted())?;
        self.watched.insert(descriptor, path.to_owned());
        Ok(descriptor)
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
            if self.watched.len() >= MOST_DIRECTORIES || self.add(&path).is_err() {
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
        if change == FileChange::Created && mask.contains(AddWatchFlags::IN_ISDIR) && self.recursive
        {
            if self.watched.len() >= MOST_DIRECTORIES || self.add(&path).is_err() {
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
