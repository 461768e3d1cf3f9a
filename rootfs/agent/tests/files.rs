//! Work on files, in processes beside the commands.

// Not every test uses all of the shared support.
#[allow(dead_code)]
mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use support::Host;
use support::processes::{Processes, files, lines, scratch, text};
use thaw_wire::frame::{Frame, Kind};
use thaw_wire::message::{FileEvent, FileInfo, FileKind, FileWork, Signal};

/// What a directory holds once drafts had time to go.
fn settled(dir: &std::path::Path) -> Vec<String> {
    for _ in 0..100 {
        let entries = std::fs::read_dir(dir).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let names: Vec<_> = names.collect();
        if !names.iter().any(|name| name.starts_with(".thaw-upload-")) {
            return names;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("a draft stays")
}

#[test]
fn a_file_goes_in_and_comes_out_whole() {
    let dir = scratch("round");
    let mut host = Host::new("files-round");
    let bytes: Vec<u8> = (0..(50_u32 << 20))
        .map(|n| (n.wrapping_mul(7) >> 3) as u8)
        .collect();
    let path = text(&dir.join("a/b/big"));
    let write = |mode, parents| FileWork::Write {
        path: path.clone(),
        mode,
        parents,
    };
    assert_eq!(
        host.work(100, write(None, false)).exit.exit_code,
        2,
        "no directory"
    );
    host.open(101, files(write(Some(0o640), true)));
    host.feed(101, &bytes);
    let written = host.finish(101);
    assert_eq!(written.exit.exit_code, 0, "{}", written.err());
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o640
    );
    let read = host.work(102, FileWork::Read { path: path.clone() });
    assert!(read.stdout == bytes && read.exit.exit_code == 0);
    // A replacement keeps the mode; one that is killed changes nothing.
    host.open(103, files(write(None, false)));
    host.feed(103, b"new");
    assert_eq!(host.finish(103).exit.exit_code, 0);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o640
    );
    host.open(104, files(write(None, false)));
    host.send(&Frame::new(104, Kind::Stdin, vec![9; 1000]));
    std::thread::sleep(Duration::from_millis(200));
    // As if it wrote to a file system that has no files without a name.
    let [writer] = host.children()[..] else {
        panic!("the transfer is the only child")
    };
    let draft = format!("a/b/.thaw-upload-{writer}-0011223344556677");
    std::fs::write(dir.join(draft), "half").unwrap();
    host.signal(104, Signal::Kill);
    assert_eq!(host.finish(104).exit.exit_code, 137);
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(settled(&dir.join("a/b")), ["big"]);
    // Nothing is something, too.
    host.open(105, files(write(None, false)));
    host.feed(105, b"");
    assert_eq!(host.finish(105).exit.exit_code, 0);
    let left: Vec<_> = std::fs::read_dir(dir.join("a/b")).unwrap().collect();
    assert_eq!(left.len(), 1);
    assert_eq!(std::fs::read(&path).unwrap(), b"");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn what_is_no_file_is_refused_and_hangs_nobody() {
    let dir = scratch("odd");
    let mut host = Host::new("files-odd");
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
    let at = |name: &str| text(&dir.join(name));
    let mut stream = 100;
    let mut code = |work: FileWork| {
        stream += 1;
        let outcome = host.work(stream, work);
        assert!(outcome.exit.exit_code == 0 || !outcome.err().is_empty());
        outcome.exit.exit_code
    };
    let read = |path: String| FileWork::Read { path };
    assert_eq!(code(read(at("fifo"))), libc::EINVAL);
    assert_eq!(code(read(text(&dir))), libc::EISDIR);
    assert_eq!(code(read(at("missing"))), libc::ENOENT);
    assert_eq!(code(read("a\0b".into())), libc::EINVAL);
    assert_eq!(code(read("/proc/self/mem".into())), libc::EIO);
    assert_eq!(code(read("x".repeat(5000))), libc::ENAMETOOLONG);
    let write = |path: String| FileWork::Write {
        path,
        mode: None,
        parents: false,
    };
    assert_eq!(code(write(text(&dir))), libc::EISDIR);
    assert_eq!(code(write(at("fifo"))), libc::EINVAL);
    let remove = |path: String, recursive| FileWork::Remove { path, recursive };
    for root in ["/", "/proc/..", "//."] {
        assert_eq!(code(remove(root.into(), true)), libc::EBUSY);
    }
    std::os::unix::fs::symlink("/", dir.join("root")).unwrap();
    assert_eq!(code(remove(at("root"), true)), 0);
    // The longest name there is, of the longest characters.
    let longest = at(&"\u{1f600}".repeat(63));
    assert_eq!(code(remove(longest.clone(), false)), libc::ENOENT);
    assert_eq!(code(remove(at("missing"), true)), libc::ENOENT);
    assert_eq!(code(remove(text(&dir), false)), libc::ENOTEMPTY);
    assert_eq!(code(remove(at("link"), true)), 0);
    assert_eq!(code(remove(text(&dir), true)), 0);
    assert!(!dir.exists());
}

#[test]
fn lists_and_facts() {
    let dir = scratch("list");
    let mut host = Host::new("files-list");
    std::fs::create_dir(dir.join("b")).unwrap();
    std::fs::write(dir.join("b/inner"), "12345").unwrap();
    std::fs::write(dir.join("a\nx"), "1").unwrap();
    std::os::unix::fs::symlink("b", dir.join("c")).unwrap();
    let list = |recursive, limit| FileWork::List {
        path: text(&dir),
        recursive,
        limit,
    };
    let names = |infos: &[FileInfo]| -> Vec<String> {
        let base = text(&dir) + "/";
        infos
            .iter()
            .map(|info| info.path.replace(&base, ""))
            .collect()
    };
    let flat: Vec<FileInfo> = lines(&host.work(100, list(false, 100)));
    assert_eq!(names(&flat), ["a\nx", "b", "c"]);
    assert_eq!(flat[2].target.as_deref(), Some("b"));
    let deep: Vec<FileInfo> = lines(&host.work(101, list(true, 100)));
    assert_eq!(names(&deep), ["a\nx", "b", "b/inner", "c"]);
    assert_eq!((deep[2].kind, deep[2].size), (FileKind::File, 5));
    let some: Vec<FileInfo> = lines(&host.work(102, list(true, 2)));
    assert_eq!(names(&some), ["a\nx", "b"]);
    let path = text(&dir.join("new/deep"));
    let mkdir = |parents| FileWork::Mkdir {
        path: path.clone(),
        parents,
    };
    assert_eq!(host.work(103, mkdir(false)).exit.exit_code, libc::ENOENT);
    assert_eq!(host.work(104, mkdir(true)).exit.exit_code, 0);
    let rename = FileWork::Rename {
        from: path.clone(),
        to: text(&dir.join("moved")),
    };
    assert_eq!(host.work(105, rename).exit.exit_code, 0);
    let stat = FileWork::Stat {
        path: text(&dir.join("moved")),
    };
    let found: Vec<FileInfo> = lines(&host.work(106, stat));
    assert_eq!(found[0].kind, FileKind::Directory);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn changes_are_told_as_they_happen() {
    let dir = scratch("watch");
    let mut host = Host::new("files-watch");
    let watch = FileWork::Watch {
        path: text(&dir),
        recursive: true,
    };
    host.open(100, files(watch));
    host.until(100, "{}\n");
    std::fs::create_dir(dir.join("new")).unwrap();
    host.until(100, "/new\"}\n");
    std::fs::write(dir.join("new/file"), "x").unwrap();
    let told = host.until(100, "modified");
    let events: Vec<FileEvent> = told
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    assert!(
        events.iter().all(|event| event.path.ends_with("/new/file")),
        "{events:?}"
    );
    std::fs::remove_file(dir.join("new/file")).unwrap();
    host.until(100, "removed");
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(host.finish(100).exit.exit_code, 0);
}

#[test]
fn names_may_be_anything_and_permissions_are_respected() {
    let dir = scratch("names");
    let mut host = Host::new("files-names");
    let names = [
        "\u{1f600}".repeat(63),
        "new\nline".into(),
        " ".into(),
        "-rf".into(),
        "a\\\"b".into(),
    ];
    for (stream, name) in (100..).step_by(2).zip(names) {
        let path = text(&dir.join(&name));
        let write = FileWork::Write {
            path: path.clone(),
            mode: None,
            parents: false,
        };
        host.open(stream, files(write));
        host.feed(stream, name.as_bytes());
        let written = host.finish(stream);
        assert_eq!(written.exit.exit_code, 0, "{}", written.err());
        let read = host.work(stream + 1, FileWork::Read { path });
        assert_eq!(read.out(), name);
    }
    // Relative to where commands start, which is where this fails, and why it is said.
    let read = |path: &str| FileWork::Read { path: path.into() };
    let missing = host.work(200, read("no/such"));
    assert_eq!(missing.err(), "no/such: No such file or directory\n");
    if !nix::unistd::geteuid().is_root() {
        let secret = dir.join("secret");
        std::fs::write(&secret, "").unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o000)).unwrap();
        let refused = host.work(201, read(&text(&secret)));
        assert_eq!(refused.exit.exit_code, libc::EACCES);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_directory_that_moves_is_told_of_once_and_followed() {
    let (dir, outside) = (scratch("moves"), scratch("outside"));
    let mut host = Host::new("files-moves");
    std::fs::create_dir_all(dir.join("a/sub")).unwrap();
    let watch = FileWork::Watch {
        path: text(&dir),
        recursive: true,
    };
    host.open(100, files(watch));
    let mut told = host.until(100, "{}\n");
    std::fs::rename(dir.join("a"), dir.join("b")).unwrap();
    told += &host.until(100, "/b/sub\"}\n");
    std::fs::write(dir.join("b/sub/f"), "x").unwrap();
    told += &host.until(100, "modified");
    // Elsewhere it is no longer anybody's business.
    std::fs::rename(dir.join("b"), outside.join("b")).unwrap();
    told += &host.until(100, "removed");
    std::fs::write(outside.join("b/unseen"), "x").unwrap();
    std::fs::write(dir.join("last"), "x").unwrap();
    told += &host.until(100, "/last\"}\n");
    host.signal(100, Signal::Kill);
    host.finish(100);
    let base = text(&dir) + "/";
    let events: Vec<(String, String)> = told
        .lines()
        .filter_map(|line| serde_json::from_str::<FileEvent>(line).ok())
        .map(|event| (format!("{:?}", event.event), event.path.replace(&base, "")))
        .collect();
    let expected = [
        ("Removed", "a"),
        ("Created", "b"),
        ("Created", "b/sub"),
        ("Created", "b/sub/f"),
        ("Modified", "b/sub/f"),
        ("Removed", "b"),
        ("Created", "last"),
    ];
    let expected = expected.map(|(event, path)| (event.to_owned(), path.to_owned()));
    assert_eq!(events[..7], expected);
    for dir in [dir, outside] {
        std::fs::remove_dir_all(dir).unwrap();
    }
}
