//! Which files differ between two snapshots: each is restored, its guest lists what it has, and the lists are compared.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::{NewVm, Options, VmError, Vms};
use crate::session::{Attached, Command, Language, PlanLimits, SessionSpec, TenantId};

/// Seconds that a guest may take to list its files.
const LISTING: Duration = Duration::from_secs(60);

/// Prints one JSON array a line: path, kind, bytes, time of change in ns, mode. What is no file system of the guest's own is
/// left out, and so is what changes by itself.
const LIST: &str = r#"
import json, os, stat
skip = {"/proc", "/sys", "/dev", "/run"}
def show(path):
    s = os.lstat(path)
    name = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    kind = "directory" if stat.S_ISDIR(s.st_mode) else "link" if stat.S_ISLNK(s.st_mode) else \
        "file" if stat.S_ISREG(s.st_mode) else "other"
    size, time = (0, 0) if kind == "directory" else (s.st_size, s.st_mtime_ns)
    print(json.dumps([name, kind, size, time, stat.S_IMODE(s.st_mode)]))
for at, directories, files in os.walk("/"):
    if at == "/":
        directories[:] = [name for name in directories if "/" + name not in skip]
    for name in directories + files:
        try:
            show(os.path.join(at, name))
        except FileNotFoundError:
            pass
"#;

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// Only the second has it.
    Added,
    /// Only the first has it.
    Removed,
    /// Both have it, with another size, time, kind or mode.
    Changed,
}

/// A file that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Where it is in the guest.
    pub path: String,
    /// What became of it.
    pub how: How,
    /// `file`, `directory`, `link` or `other`.
    pub kind: String,
    /// Bytes in the first.
    pub bytes_before: Option<u64>,
    /// Bytes in the second.
    pub bytes_after: Option<u64>,
}

/// A file as its guest tells of it.
type File = (String, u64, i128, u32);

impl Vms {
    /// The files that differ between two snapshots of the tenant, by path.
    ///
    /// # Errors
    /// There are none such, they cannot be restored, or their guests cannot list their files.
    pub async fn changed_files(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        from: &str,
        to: &str,
    ) -> Result<Vec<Change>, VmError> {
        let first = self.files_of(tenant, limits, from).await?;
        let second = self.files_of(tenant, limits, to).await?;
        Ok(compare(&first, &second))
    }

    async fn files_of(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        snapshot: &str,
    ) -> Result<BTreeMap<String, File>, VmError> {
        let manifest = self.snapshots().any(tenant, snapshot)?.manifest;
        let new = NewVm {
            session: None,
            spec: SessionSpec {
                lifetime: LISTING + Duration::from_secs(60),
                memory_mib: manifest.memory_mib,
                vcpus: manifest.vcpus,
                metadata: BTreeMap::new(),
                env: BTreeMap::new(),
            },
            options: Options::default(),
            snapshot: Some(snapshot.to_owned()),
            memory_asked: false,
        };
        // In a task of its own: whoever asked may go away, the VM must end all the same.
        let (this, owner, id) = (self.clone(), tenant.clone(), snapshot.to_owned());
        let listing = tokio::spawn(async move {
            let vm = this.create(&owner, limits, new, true).await?;
            let listed = this.list_files(&owner, limits, &vm).await;
            this.delete(&owner, &vm.vm_id).await?;
            if let Some(session) = vm.session() {
                this.sessions.unmake(&owner, &session);
            }
            listed
        });
        let cut = |error: tokio::task::JoinError| {
            VmError::Session(crate::session::SessionError::Unavailable(error.into()))
        };
        let text = listing.await.map_err(cut)??;
        parse(&text).ok_or_else(|| {
            VmError::State(format!(
                "the guest of snapshot {id} tells nonsense of its files"
            ))
        })
    }

    async fn list_files(
        &self,
        tenant: &TenantId,
        limits: PlanLimits,
        vm: &super::VmRecord,
    ) -> Result<String, VmError> {
        let session = self.session_of(vm)?;
        let accepted = self.sessions.accept(tenant, &session)?;
        let command = Command {
            language: Language::Bash,
            code: format!("python3 -I -c '{LIST}'"),
            context: None,
            live: false,
            timeout: LISTING,
            answer_within: Some(LISTING),
        };
        let run = self
            .sessions
            .run(accepted, limits, command, Attached::default());
        let outcome = run.await?;
        if outcome.exit_code != 0 {
            let last = outcome.stderr.trim_end().lines().last();
            return Err(VmError::State(format!(
                "the guest cannot list its files: {}",
                last.unwrap_or("it does not say why")
            )));
        }
        if outcome.truncated_bytes > 0 {
            return Err(VmError::State(
                "the guest has more files than can be listed; session.output_bytes bounds that"
                    .to_owned(),
            ));
        }
        Ok(outcome.stdout)
    }
}

/// A guest's list; `None` if a line is none.
fn parse(text: &str) -> Option<BTreeMap<String, File>> {
    let files = text.lines().map(|line| {
        let (path, kind, bytes, time, mode): (String, String, u64, i128, u32) =
            serde_json::from_str(line).ok()?;
        Some((path, (kind, bytes, time, mode)))
    });
    files.collect()
}

fn compare(first: &BTreeMap<String, File>, second: &BTreeMap<String, File>) -> Vec<Change> {
    let change = |path: &str, before: Option<&File>, after: Option<&File>| {
        let how = match (before, after) {
            (None, _) => How::Added,
            (_, None) => How::Removed,
            _ => How::Changed,
        };
        Change {
            path: path.to_owned(),
            how,
            kind: after
                .or(before)
                .map(|file| file.0.clone())
                .unwrap_or_default(),
            bytes_before: before.map(|file| file.1),
            bytes_after: after.map(|file| file.1),
        }
    };
    let gone_or_changed = first.iter().filter_map(|(path, file)| {
        let now = second.get(path);
        (now != Some(file)).then(|| change(path, Some(file), now))
    });
    let added = second.iter().filter(|(path, _)| !first.contains_key(*path));
    let mut all: Vec<Change> = gone_or_changed
        .chain(added.map(|(path, file)| change(path, None, Some(file))))
        .collect();
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_told_by_path_and_nonsense_is_refused() {
        let list = |lines: &[&str]| parse(&lines.join("\n"));
        let first = list(&[
            r#"["/a", "file", 10, 5, 420]"#,
            r#"["/b", "file", 3, 5, 420]"#,
            r#"["/d", "directory", 0, 0, 493]"#,
        ]);
        let second = list(&[
            r#"["/a", "file", 10, 5, 420]"#,
            r#"["/c", "link", 1, 9, 511]"#,
            r#"["/d", "directory", 0, 0, 448]"#,
        ]);
        let changes = compare(&first.unwrap(), &second.unwrap());
        let told: Vec<_> = changes
            .iter()
            .map(|one| (one.path.as_str(), one.how))
            .collect();
        assert_eq!(
            told,
            [
                ("/b", How::Removed),
                ("/c", How::Added),
                ("/d", How::Changed)
            ]
        );
        assert_eq!(
            (changes[0].bytes_before, changes[0].bytes_after),
            (Some(3), None)
        );
        for nonsense in ["x", "[1]", r#"["/a", "file", -1, 5, 420]"#] {
            assert!(list(&[nonsense]).is_none());
        }
    }
}
