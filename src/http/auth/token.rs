//! Bearer tokens: what `POST /token` gives, signed with a key that never leaves the data directory.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::Context;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rand::RngCore;
use serde::{Deserialize, Serialize};

/// The file in the data directory that holds the signing key.
const FILE: &str = "token.key";

/// Bytes of the signing key: as many as HMAC-SHA-256 can use.
const KEY_BYTES: usize = 32;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The user's id.
    pub sub: String,
    /// The user's epoch when the token was given.
    pub epoch: i64,
    /// Good until then, seconds since the Unix epoch.
    pub exp: i64,
    /// Given then.
    pub iat: i64,
}

/// Makes and checks tokens.
pub struct Tokens {
    sign: EncodingKey,
    verify: DecodingKey,
    rules: Validation,
    lifetime_s: u64,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens")
    }
}

impl Tokens {
    /// Reads the signing key, or makes it on the first start.
    ///
    /// # Errors
    /// The file cannot be read or made, or is not a key.
    pub fn open(data_dir: &Path, lifetime_s: u64) -> anyhow::Result<Self> {
        let path = data_dir.join(FILE);
        let secret = match std::fs::File::open(&path) {
            Ok(file) => {
                let mut secret = Vec::new();
                file.take(1024).read_to_end(&mut secret)?;
                secret
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => make_secret(&path)?,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        anyhow::ensure!(
            secret.len() == KEY_BYTES,
            "{} is damaged; remove it (all bearer tokens end) and start again",
            path.display()
        );
        let mut rules = Validation::new(Algorithm::HS256);
        rules.leeway = 0;
        Ok(Self {
            sign: EncodingKey::from_secret(&secret),
            verify: DecodingKey::from_secret(&secret),
            rules,
            lifetime_s,
        })
    }

    /// Seconds a token is good for.
    pub fn lifetime_s(&self) -> u64 {
        self.lifetime_s
    }

    /// A token for a user.
    ///
    /// # Errors
    /// It cannot be signed.
    pub fn give(&self, user_id: &str, epoch: i64) -> anyhow::Result<String> {
        let iat = jiff::Timestamp::now().as_second();
        let claims = Claims {
            sub: user_id.to_owned(),
            epoch,
            exp: iat.saturating_add_unsigned(self.lifetime_s),
            iat,
        };
        jsonwebtoken::encode(&Header::default(), &claims, &self.sign).context("cannot sign a token")
    }

    /// What a token says, when it is ours and still good.
    pub fn read(&self, token: &str) -> Option<Claims> {
        jsonwebtoken::decode::<Claims>(token, &self.verify, &self.rules)
            .ok()
            .map(|data| data.claims)
    }
}

fn make_secret(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut secret = vec![0; KEY_BYTES];
    rand::rng().fill_bytes(&mut secret);
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .tempfile_in(dir)
        .with_context(|| format!("cannot write in {}", dir.display()))?;
    file.write_all(&secret)?;
    file.as_file().sync_all()?;
    file.persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_a_restart_and_nothing_else_is_believed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let token = Tokens::open(dir.path(), 60).unwrap().give("u", 3).unwrap();
        let again = Tokens::open(dir.path(), 60).unwrap();
        let claims = again.read(&token).unwrap();
        assert_eq!((claims.sub.as_str(), claims.epoch), ("u", 3));
        let mode = std::fs::metadata(dir.path().join(FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        let other = tempfile::tempdir().unwrap();
        assert_eq!(Tokens::open(other.path(), 60).unwrap().read(&token), None);
        // "alg": "none", empty signature.
        let body = token.split('.').nth(1).unwrap();
        let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}.");
        assert_eq!(again.read(&unsigned), None);
    }

    #[test]
    fn an_old_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path(), 60).unwrap();
        let claims = Claims {
            sub: "u".into(),
            epoch: 0,
            exp: 1000,
            iat: 900,
        };
        let old = jsonwebtoken::encode(&Header::default(), &claims, &tokens.sign).unwrap();
        assert_eq!(tokens.read(&old), None);
    }
}
