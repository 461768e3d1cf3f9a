use std::fs::File;
use std::io::Read;

use super::super::manifest::FORMAT;
use super::super::tests::{config, ground, make, tenant};
use super::super::{Catalog, Ground, Manifest, Snapshots, snapshots_dir};
use super::{Export, Import, Imported};

/// A directory with one snapshot, that, and the file that it is exported to.
async fn exported() -> (tempfile::TempDir, Manifest, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), ground(), config()).unwrap();
    let id = make(&snapshots, "a", 200).await.unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let one = catalog.find(&id).unwrap().clone();
    let export = Export::open(&catalog, &one).unwrap();
    let (mut file, mut seen) = (Vec::new(), 0);
    export.write(&mut file, 3, |bytes| seen += bytes).unwrap();
    assert_eq!(seen, export.bytes());
    (dir, one, file)
}

fn import(
    dir: &tempfile::TempDir,
    file: impl Read,
    ground: impl FnOnce() -> Ground,
) -> anyhow::Result<Imported> {
    let import = Import {
        data_dir: dir.path(),
        tenant: "b",
        disk_floor_mib: 0,
    };
    import.run(file, |_| Ok(ground()))
}

/// Everything below the snapshots' directory but its lock.
fn files(dir: &tempfile::TempDir) -> Vec<String> {
    let snapshots = snapshots_dir(dir.path());
    let mut found = Vec::new();
    for sub in std::fs::read_dir(&snapshots).into_iter().flatten() {
        let sub = sub.unwrap().path();
        for file in std::fs::read_dir(&sub).into_iter().flatten() {
            let file = file.unwrap().path();
            found.push(file.strip_prefix(&snapshots).unwrap().display().to_string());
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_snapshot_arrives_whole_and_a_server_that_runs_offers_it() {
    let (from, one, file) = exported().await;
    let to = tempfile::tempdir().unwrap();
    let server = Snapshots::open(to.path(), ground(), config()).unwrap();
    assert!(!server.has(&one.id));
    let imported = import(&to, &file[..], ground).unwrap();
    assert!(matches!(imported, Imported::New(_)));
    assert_eq!(files(&from), files(&to));
    assert_eq!(server.list(&tenant("b")).len(), 1);
    assert!(server.get(&tenant("a"), &one.id).is_err());
    let (frozen, manifest) = server.frozen(&tenant("b"), &one.id).await.unwrap();
    assert_eq!(
        (manifest.state, &manifest.memory.map),
        (one.state.clone(), &one.memory.map)
    );
    let catalog = Catalog::open(from.path()).unwrap();
    let (_, layers) = catalog.layers(&one).unwrap();
    for page in 0..layers.map.pages() {
        let (mut here, mut there) = ([0; 4096], [0; 4096]);
        frozen.memory.read(page, &mut here).unwrap();
        layers.read(page, &mut there).unwrap();
        assert!(here == there, "page {page}");
    }
    let again = import(&to, &file[..], ground).unwrap();
    assert!(matches!(again, Imported::Known(_)));
    server.delete(&tenant("b"), &one.id).await.unwrap();
    server.sweep_now().await;
    assert_eq!(files(&to), Vec::<String>::new());
    assert!(server.list(&tenant("b")).is_empty());
}

#[tokio::test]
async fn an_export_goes_on_where_it_broke_off_and_writes_the_same_file() {
    let (from, one, whole) = exported().await;
    let catalog = Catalog::open(from.path()).unwrap();
    let export = Export::open(&catalog, &one).unwrap();
    for cut in (0..=whole.len()).step_by(whole.len() / 61) {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &whole[..cut]).unwrap();
        let mut seen = 0;
        export.resume(&mut file, 3, |bytes| seen += bytes).unwrap();
        assert_eq!(seen, export.bytes());
        assert!(read(file) == whole, "cut at {cut}");
    }
    // What another snapshot left, and damage, are written anew.
    let mut other = whole.clone();
    other[whole.len() / 2] ^= 1;
    for start in [&b"something else"[..], &other] {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, start).unwrap();
        export.resume(&mut file, 3, |_| {}).unwrap();
        assert!(read(file) == whole);
    }
}

fn read(mut file: File) -> Vec<u8> {
    std::io::Seek::rewind(&mut file).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn an_import_that_breaks_off_leaves_no_snapshot_and_the_next_one_goes_on() {
    let (_from, one, file) = exported().await;
    let to = tempfile::tempdir().unwrap();
    // The last: nothing is missing but a byte of the checksum. How much earlier ones give away is the packer's affair,
    // which unpacks by the block, and all of this may be one.
    let cuts = (0..file.len()).step_by(file.len() / 37);
    for cut in cuts.chain([file.len() - 1]) {
        assert!(import(&to, &file[..cut], ground).is_err(), "cut at {cut}");
        assert!(Catalog::open(to.path()).unwrap().snapshots.is_empty());
    }
    let kept = snapshots_dir(to.path()).join("importing").join(&one.id);
    assert!(kept.join(one.memory.chunks[0].sha256.as_str()).exists());
    import(&to, &file[..], ground).unwrap();
    assert!(!kept.exists());
    let catalog = Catalog::open(to.path()).unwrap();
    assert_eq!(catalog.verify(&catalog.snapshots[0], |_| {}).unwrap(), []);
}

#[tokio::test]
async fn no_damaged_byte_gets_in() {
    let (_from, _, file) = exported().await;
    for at in (0..file.len()).step_by(file.len() / 97) {
        let to = tempfile::tempdir().unwrap();
        let mut file = file.clone();
        file[at] ^= 0x10;
        // Some bits of a frame's head mean nothing; then what arrives is what was sent.
        if import(&to, &file[..], ground).is_ok() {
            let catalog = Catalog::open(to.path()).unwrap();
            assert_eq!(catalog.verify(&catalog.snapshots[0], |_| {}).unwrap(), []);
        }
    }
}

#[tokio::test]
async fn damage_in_what_is_staged_already_is_seen_all_the_same() {
    let (_from, _, file) = exported().await;
    let (mut passed, mut seen) = (Vec::new(), 0);
    for at in (0..file.len()).step_by(file.len() / 211) {
        let to = tempfile::tempdir().unwrap();
        assert!(import(&to, &file[..file.len() - 20], ground).is_err());
        let mut damaged = file.clone();
        damaged[at] ^= 0x20;
        let mut tar = Vec::new();
        let unpacks = zstd::stream::copy_decode(&damaged[..], &mut tar).is_ok();
        match import(&to, &damaged[..], ground) {
            Ok(_) => passed.push((at, unpacks)),
            Err(_) => seen += 1,
        }
    }
    assert!(
        passed.iter().all(|(_, unpacks)| *unpacks),
        "{passed:?} of {}, {seen} seen",
        file.len()
    );
}

#[tokio::test]
async fn another_machine_image_or_processor_is_refused_with_the_reason() {
    let (_from, _, file) = exported().await;
    let to = tempfile::tempdir().unwrap();
    let why = |ground: Ground| format!("{:#}", import(&to, &file[..], || ground).unwrap_err());
    let mut other = ground();
    other.machine = thaw_vmm::machine::MachineKind::Hvm;
    assert!(why(other).contains("machine pv"));
    let mut other = ground();
    other.image = "sha256-2".into();
    assert!(why(other).contains("image"));
    let alien = repacked(&file, |manifest| {
        manifest["cpu"]["flags"] = serde_json::json!(["of_the_future"]);
    });
    let why = format!("{:#}", import(&to, &alien[..], ground).unwrap_err());
    assert!(why.contains("of_the_future"), "{why}");
    assert!(files(&to).is_empty());
}

type Lie = fn(&mut serde_json::Value);

#[tokio::test]
async fn a_manifest_that_lies_is_refused() {
    let (_from, one, file) = exported().await;
    let to = tempfile::tempdir().unwrap();
    let lies: [(&str, Lie); 9] = [
        ("format", |m| m["format"] = (FORMAT + 1).into()),
        ("id", |m| m["id"] = "../../etc".into()),
        ("odd", |m| m["name"] = "\u{1b}[2J".into()),
        ("size", |m| m["memory_mib"] = 9000.into()),
        ("size", |m| m["memory"]["bytes"] = 4096.into()),
        ("digest", |m| m["memory"]["base"] = "../x".into()),
        ("twice", |m| {
            let chunk = m["memory"]["chunks"][0].clone();
            m["memory"]["chunks"].as_array_mut().unwrap().push(chunk);
        }),
        ("bytes", |m| m["memory"]["map"]["bytes"] = 1.into()),
        ("map is of another", |m| {
            m["memory_mib"] = 128.into();
            m["memory"]["bytes"] = (128 << 20).into();
        }),
    ];
    for (word, lie) in lies {
        let error = import(&to, &repacked(&file, lie)[..], ground).unwrap_err();
        let why = format!("{error:#}");
        assert!(
            why.contains(word) || why.contains("damaged"),
            "{word}: {why}"
        );
        assert!(!snapshots_dir(to.path()).join(&one.id).exists());
    }
}

/// The file with another manifest, every other entry as it was.
fn repacked(file: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut tar = Vec::new();
    zstd::stream::copy_decode(file, &mut tar).unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut change = Some(change);
    for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut header = entry.header().clone();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        if let Some(change) = change.take() {
            let mut manifest = serde_json::from_slice(&bytes).unwrap();
            change(&mut manifest);
            bytes = serde_json::to_vec(&manifest).unwrap();
            header.set_size(bytes.len() as u64);
            header.set_cksum();
        }
        builder.append(&header, &bytes[..]).unwrap();
    }
    zstd::encode_all(&builder.into_inner().unwrap()[..], 1).unwrap()
}
