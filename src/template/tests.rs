//! Templates on VMs that are not there.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use thaw_vmm::protocol::{Boot, Restore};
use thaw_wire::message::{Execute, Ready, Renew};

use super::vm::{Ran, TrialVm, Vms};
use super::*;
use crate::image::manifest::{INITRAMFS, Manifest as ImageManifest, Part, VMLINUX, tests::sample};

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    Boot,
    WrongOutput,
    KeepsGeneration,
    RenewFails,
}

#[derive(Debug, Default)]
struct Fake {
    fault: Fault,
    boots: AtomicUsize,
    restores: AtomicUsize,
}

#[derive(Debug)]
struct FakeVm {
    fault: Fault,
    ready: Ready,
}

fn vm(fault: Fault, generation: u64) -> Box<dyn TrialVm> {
    Box::new(FakeVm {
        fault,
        ready: Ready {
            generation,
            agent: "1".into(),
            kernel: "6.1".into(),
            languages: Vec::new(),
            warm: false,
        },
    })
}

impl Vms for Fake {
    fn boot(
        &self,
        _: File,
        _: File,
        boot: Boot,
    ) -> BoxFuture<'_, anyhow::Result<Box<dyn TrialVm>>> {
        Box::pin(async move {
            self.boots.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            assert!(boot.cmdline.contains("console"));
            if self.fault == Fault::Boot {
                bail!("kernel panic, says its console");
            }
            Ok(vm(self.fault, 0))
        })
    }

    fn restore(
        &self,
        state: File,
        memory: File,
        _: Option<File>,
        restore: Restore,
    ) -> BoxFuture<'_, anyhow::Result<Box<dyn TrialVm>>> {
        Box::pin(async move {
            self.restores.fetch_add(1, Ordering::SeqCst);
            assert_eq!(state.metadata()?.len(), 5);
            let mut byte = [0];
            memory.read_exact_at(&mut byte, 8192)?;
            assert_eq!(byte, [7]);
            let kept = self.fault == Fault::KeepsGeneration;
            Ok(vm(self.fault, if kept { 0 } else { restore.generation }))
        })
    }
}

impl TrialVm for FakeVm {
    fn ready(&self) -> &Ready {
        &self.ready
    }

    fn warm(&mut self, _: Vec<String>) -> BoxFuture<'_, anyhow::Result<BTreeMap<String, String>>> {
        Box::pin(async { Ok(BTreeMap::new()) })
    }

    fn quiesce(&mut self) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn renew(&mut self, renew: Renew) -> BoxFuture<'_, anyhow::Result<()>> {
        let fails = self.fault == Fault::RenewFails;
        Box::pin(async move {
            assert_eq!((renew.seed.len(), renew.machine_id.len()), (64, 32));
            if fails {
                bail!("no entropy");
            }
            Ok(())
        })
    }

    fn execute(&mut self, _: Execute) -> BoxFuture<'_, anyhow::Result<Ran>> {
        let text: &[u8] = if self.fault == Fault::WrongOutput {
            b"2\n"
        } else {
            b"1\n"
        };
        Box::pin(async move {
            Ok(Ran {
                stdout: text.to_vec(),
                ..Ran::default()
            })
        })
    }

    fn save(&mut self, mut state: File, memory: File) -> BoxFuture<'_, anyhow::Result<()>> {
        Box::pin(async move {
            state.write_all(b"state")?;
            memory.set_len(1 << 20)?;
            memory.write_all_at(&[7], 8192)?;
            Ok(())
        })
    }

    fn touched(&mut self, mut list: File) -> BoxFuture<'_, anyhow::Result<u64>> {
        Box::pin(async move {
            list.write_all(&2u64.to_le_bytes())?;
            Ok(1)
        })
    }

    fn end(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
}

/// A data directory with an image in it.
fn data() -> (tempfile::TempDir, ImageManifest) {
    let data = tempfile::tempdir().unwrap();
    let mut manifest = sample();
    manifest.vmlinux = Part::of_bytes(b"kernel");
    manifest.initramfs = Part::of_bytes(b"root");
    manifest.digest = manifest.compute_digest();
    let dir = data.path().join("images").join(&manifest.digest);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(VMLINUX), b"kernel").unwrap();
    std::fs::write(dir.join(INITRAMFS), b"root").unwrap();
    manifest.write(&dir.join("manifest.json")).unwrap();
    std::os::unix::fs::symlink(&manifest.digest, data.path().join("images/minimal")).unwrap();
    (data, manifest)
}

fn templates(data: &Path, fault: Fault) -> (Templates, Arc<Fake>) {
    let fake = Arc::new(Fake {
        fault,
        ..Fake::default()
    });
    let templates = Templates::with(data, "minimal", MachineKind::Pv, fake.clone()).unwrap();
    (templates, fake)
}

#[tokio::test]
async fn one_build_serves_everybody_and_the_next_start() {
    let (data, _) = data();
    let (all, fake) = templates(data.path(), Fault::None);
    let (a, b, c) = tokio::join!(all.get(512, 1), all.get(300, 1), all.get(512, 1));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert!(Arc::ptr_eq(&a, &b) && c.is_ok());
    assert_eq!(fake.boots.load(Ordering::SeqCst), 1);
    assert_eq!(a.manifest.memory_mib, 512);
    assert_eq!(a.manifest.memory.pages, 1);
    assert_eq!(a.working_set.metadata().unwrap().len(), 8);
    // Another server finds it on disk.
    let (again, fake) = templates(data.path(), Fault::Boot);
    let built = again.get_or_build(512, 1, false).await.unwrap();
    assert!(built.cached);
    assert_eq!(fake.boots.load(Ordering::SeqCst), 0);
    verify(&a.dir).unwrap();
    // Nothing of the build is left.
    assert_eq!(
        std::fs::read_dir(data.path().join("tmp")).unwrap().count(),
        0
    );
    assert_eq!(list(data.path()).unwrap().len(), 1);
    assert_eq!(find(data.path(), "minimal").unwrap().dir, a.dir);
    remove(&a.dir).unwrap();
    assert!(find(data.path(), "minimal").is_err());
}

#[tokio::test]
async fn a_template_that_does_not_work_is_never_published() {
    for (fault, reason) in [
        (Fault::Boot, "kernel panic"),
        (Fault::WrongOutput, "print(1)"),
        (Fault::KeepsGeneration, "generation"),
        (Fault::RenewFails, "no entropy"),
    ] {
        let (data, _) = data();
        let (all, fake) = templates(data.path(), fault);
        let (a, b) = tokio::join!(all.get(128, 1), all.get(128, 1));
        for error in [a.unwrap_err(), b.unwrap_err()] {
            assert!(format!("{error:#}").contains(reason), "{error:#}");
        }
        assert_eq!(
            fake.boots.load(Ordering::SeqCst),
            1,
            "who waits shares the failure"
        );
        assert!(list(data.path()).unwrap().is_empty());
        assert_eq!(
            std::fs::read_dir(data.path().join("tmp")).unwrap().count(),
            0
        );
        // Who asks later gets another attempt.
        assert!(all.get(128, 1).await.is_err());
        assert_eq!(fake.boots.load(Ordering::SeqCst), 2);
    }
}

#[tokio::test]
async fn a_damaged_template_is_built_again_and_verify_sees_every_byte() {
    let (data, _) = data();
    let (all, _) = templates(data.path(), Fault::None);
    let dir = all.get(128, 1).await.unwrap().dir.clone();
    let memory = File::options()
        .write(true)
        .open(dir.join(manifest::MEMORY))
        .unwrap();
    memory.write_all_at(&[1], 500_000).unwrap();
    assert!(verify(&dir).unwrap_err().to_string().contains("damaged"));
    std::fs::write(dir.join(manifest::STATE), b"stat3").unwrap();
    assert!(Template::load(&dir).is_err());
    let (all, fake) = templates(data.path(), Fault::None);
    assert!(!all.get_or_build(128, 1, false).await.unwrap().cached);
    assert_eq!(fake.boots.load(Ordering::SeqCst), 1);
    verify(&dir).unwrap();
}

#[tokio::test]
async fn a_template_of_another_host_or_thaw_is_refused() {
    let (data, _) = data();
    let (all, _) = templates(data.path(), Fault::None);
    let template = all.get(128, 1).await.unwrap();
    let path = template.dir.join(manifest::FILE);
    let mut foreign = template.manifest.clone();
    foreign.cpu.flags.insert("from_the_future".into());
    foreign.write(&path).unwrap();
    assert!(
        Template::load(&template.dir)
            .unwrap_err()
            .to_string()
            .contains("from_the_future")
    );
    let mut old = template.manifest.clone();
    old.thaw = "0.0.0".into();
    old.write(&path).unwrap();
    assert!(Template::load(&template.dir).is_err());
}

#[tokio::test]
async fn sizes_are_rounded_up_and_an_image_has_its_least() {
    assert_eq!(round_up(1), 128);
    assert_eq!(round_up(129), 256);
    assert_eq!(round_up(8192), 8192);
    assert_eq!(round_up(u32::MAX), 8192);
    let (data, _) = data();
    let (all, _) = templates(data.path(), Fault::None);
    assert_eq!(all.get(1, 1).await.unwrap().manifest.memory_mib, 128);
    assert!(all.get(128, 9).await.is_err());
}
