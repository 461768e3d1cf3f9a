//! TLS: a certificate that is given, or a self-signed one made once and kept.

use std::io::BufReader;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use rustls::ServerConfig as Rustls;
use tokio_rustls::TlsAcceptor;

use crate::config::ServerConfig;

/// Makes what the configuration asks for: nothing, when it asks for no TLS.
///
/// # Errors
/// The certificate or key cannot be read, made or used.
pub fn acceptor(config: &ServerConfig) -> anyhow::Result<Option<TlsAcceptor>> {
    let (cert, key) = if config.tls_self_signed {
        self_signed(&config.data_dir, config.listen)?
    } else if config.tls_cert.as_os_str().is_empty() {
        return Ok(None);
    } else {
        (config.tls_cert.clone(), config.tls_key.clone())
    };
    let certs = rustls_pemfile::certs(&mut open(&cert)?)
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{} is not a PEM certificate", cert.display()))?;
    if certs.is_empty() {
        bail!("{} has no certificate", cert.display());
    }
    let private = rustls_pemfile::private_key(&mut open(&key)?)
        .with_context(|| format!("{} is not a PEM key", key.display()))?
        .with_context(|| format!("{} has no private key", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = Rustls::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certs, private)
        .with_context(|| {
            format!(
                "{} and {} do not belong together",
                cert.display(),
                key.display()
            )
        })?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(tls))))
}

fn open(path: &Path) -> anyhow::Result<BufReader<std::fs::File>> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(BufReader::new(file))
}

/// The kept pair, made when it is missing. Clients trust it with `SSL_CERT_FILE` or
/// `REQUESTS_CA_BUNDLE`, so it stays the same from start to start.
fn self_signed(data_dir: &Path, listen: SocketAddr) -> anyhow::Result<(PathBuf, PathBuf)> {
    let dir = data_dir.join("tls");
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    if cert.is_file() && key.is_file() {
        return Ok((cert, key));
    }
    let mut names: Vec<String> = vec!["localhost".into(), "127.0.0.1".into(), "::1".into()];
    if let Ok(host) = nix::unistd::gethostname() {
        names.extend(host.into_string().ok());
    }
    if !listen.ip().is_unspecified() {
        names.push(listen.ip().to_string());
    }
    names.sort();
    names.dedup();
    let made = rcgen::generate_simple_self_signed(names).context("cannot make a certificate")?;
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // The key first: a certificate without its key would be taken for a whole pair by nobody.
    write_private(&key, &made.signing_key.serialize_pem())?;
    write_private(&cert, &made.cert.pem())?;
    tracing::info!(path = %cert.display(), "made a self-signed certificate; clients must trust this file");
    Ok((cert, key))
}

/// A temporary file has mode 0600; the rename makes it whole or absent.
fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir)?;
    std::fs::write(file.path(), text)?;
    file.as_file().sync_all()?;
    file.persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_self_signed_pair_is_made_once_and_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let config = ServerConfig {
            data_dir: dir.path().into(),
            tls_self_signed: true,
            ..ServerConfig::default()
        };
        assert!(acceptor(&config).unwrap().is_some());
        let key = dir.path().join("tls/key.pem");
        let before = std::fs::read(&key).unwrap();
        assert!(acceptor(&config).unwrap().is_some());
        assert_eq!(std::fs::read(&key).unwrap(), before);
        assert_eq!(
            std::fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn missing_files_are_named() {
        let config = ServerConfig {
            tls_cert: "/nowhere/cert.pem".into(),
            tls_key: "/nowhere/key.pem".into(),
            ..ServerConfig::default()
        };
        let error = acceptor(&config).err().unwrap();
        assert!(format!("{error:#}").contains("/nowhere/cert.pem"));
    }
}
