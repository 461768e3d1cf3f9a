//! Who is asking: API keys in `X-API-Key`, bearer tokens, passwords.
//!
//! `X-API-Key` wins; `Authorization` is then not looked at (clients add one from `~/.netrc` without
//! being asked). A body's `api_key` counts only when no header says anything. No key, no service.

mod directory;
pub mod key;
pub mod password;
pub mod token;

use std::num::NonZeroU32;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hyper::HeaderMap;
use tokio::sync::Semaphore;

pub use directory::{Caller, Directory};
pub use token::Tokens;

use crate::config::{AuthConfig, DefaultPlan};
use crate::store::{KeyRow, NewKey, Store, UserRow};

/// Password checks at once: each takes 19 MiB and tens of milliseconds of a core.
const PASSWORD_CHECKS: usize = 2;

/// User names whose attempts are remembered; beyond it, settled ones are forgotten.
const LOGIN_NAMES: usize = 10_000;

/// How often it is stored when keys were last used: seldom, since it is for people.
const STORE_USES: Duration = Duration::from_secs(30);

/// The name of the user that the first start makes.
pub const FIRST_USER: &str = "owner";

/// Authenticates requests.
#[derive(Debug)]
pub struct Auth {
    store: Store,
    default_plan: DefaultPlan,
    directory: RwLock<Arc<Directory>>,
    tokens: Tokens,
    logins: DefaultKeyedRateLimiter<String>,
    password_checks: Semaphore,
}

/// Why somebody is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request says nothing about who makes it.
    NoCredentials,
    /// What it says is not true, or not any more.
    BadCredentials,
    /// Too many attempts.
    TooManyLogins,
}

/// What the headers say about who is asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presented<'a> {
    /// Nothing.
    Nothing,
    /// A key or token.
    Secret(&'a str),
    /// Something that cannot be either.
    Garbage,
}

/// What the headers say about who is asking.
pub fn presented(headers: &HeaderMap) -> Presented<'_> {
    if let Some(value) = headers.get("x-api-key") {
        return value
            .to_str()
            .map_or(Presented::Garbage, |text| Presented::Secret(text.trim()));
    }
    let Some(value) = headers.get(hyper::header::AUTHORIZATION) else {
        return Presented::Nothing;
    };
    let bearer = value.to_str().ok().and_then(|text| text.split_once(' '));
    match bearer {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("bearer") => {
            Presented::Secret(rest.trim())
        }
        // Another scheme (Basic from a .netrc) says nothing to us.
        _ => Presented::Nothing,
    }
}

impl Auth {
    /// Reads who may use the server.
    ///
    /// # Errors
    /// The store's.
    pub async fn start(
        store: Store,
        tokens: Tokens,
        config: &AuthConfig,
        default_plan: DefaultPlan,
    ) -> anyhow::Result<Arc<Self>> {
        let directory = Directory::load(&store, &default_plan, &Directory::default()).await?;
        let per_minute = NonZeroU32::new(config.logins_per_minute).unwrap_or(NonZeroU32::MIN);
        Ok(Arc::new(Self {
            store,
            default_plan,
            directory: RwLock::new(Arc::new(directory)),
            tokens,
            logins: RateLimiter::keyed(Quota::per_minute(per_minute)),
            password_checks: Semaphore::new(PASSWORD_CHECKS),
        }))
    }

    /// Follows the database until the server ends, so that a revoked key stops working.
    pub async fn follow(self: Arc<Self>) {
        let mut changes = self.store.watch_changes();
        while changes.changed().await.is_ok() {
            if let Err(error) = self.reload().await {
                tracing::error!(%error, "cannot read users and keys; a key just revoked may still work");
            }
        }
    }

    /// Stores when keys were last used, from time to time, until the server ends.
    pub async fn note_uses(self: Arc<Self>) {
        loop {
            tokio::time::sleep(STORE_USES).await;
            self.flush_uses().await;
        }
    }

    /// Stores when keys were last used.
    pub async fn flush_uses(&self) {
        let directory = self.directory();
        let uses = directory.new_uses();
        if uses.is_empty() {
            return;
        }
        let rows = uses.clone();
        match self.store.call(move |c| KeyRow::used(c, &rows)).await {
            Ok(()) => directory.stored_uses(&uses),
            Err(error) => tracing::warn!(%error, "when keys were used is not stored yet"),
        }
    }

    /// Reads users, keys and plans anew.
    ///
    /// # Errors
    /// The store's.
    pub async fn reload(&self) -> anyhow::Result<()> {
        let before = self.directory();
        let now = Directory::load(&self.store, &self.default_plan, &before).await?;
        *self
            .directory
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(now);
        Ok(())
    }

    /// Everybody who may use the server, as of now.
    pub fn directory(&self) -> Arc<Directory> {
        self.directory
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Seconds a bearer token is good for.
    pub fn token_lifetime_s(&self) -> u64 {
        self.tokens.lifetime_s()
    }

    /// Who has this key or token.
    ///
    /// # Errors
    /// Nobody.
    pub fn check(&self, secret: &str) -> Result<Caller, Refusal> {
        let directory = self.directory();
        if let Some(caller) = directory.by_key(secret) {
            return Ok(caller.clone());
        }
        self.tokens
            .read(secret)
            .and_then(|claims| {
                let caller = directory.by_user_id(&claims.sub)?;
                (caller.user.epoch == claims.epoch).then(|| caller.clone())
            })
            .ok_or(Refusal::BadCredentials)
    }

    /// A bearer token for whoever knows the user's password. One of the user's API keys counts as
    /// a password, so that the first key is enough to start with.
    ///
    /// # Errors
    /// The password is not right, or too many were tried.
    pub async fn log_in(&self, name: &str, secret: &str) -> Result<String, Refusal> {
        if self.logins.len() >= LOGIN_NAMES {
            self.logins.retain_recent();
        }
        // Long names share one limiter instead of each taking memory.
        let counted = if name.len() <= 128 { name } else { "" };
        if self.logins.len() >= LOGIN_NAMES || self.logins.check_key(&counted.to_owned()).is_err() {
            return Err(Refusal::TooManyLogins);
        }
        let directory = self.directory();
        let user = directory
            .by_user_name(name)
            .map(|caller| caller.user.clone());
        let by_key = directory.by_key(secret).map(|caller| caller.user.clone());
        let user = match (user, by_key) {
            (Some(user), Some(owner)) if user.id == owner.id => user,
            (user, _) => {
                let stored = user.as_ref().and_then(|user| user.password.clone());
                let secret = secret.to_owned();
                let Ok(_permit) = self.password_checks.acquire().await else {
                    return Err(Refusal::BadCredentials);
                };
                let right = tokio::task::spawn_blocking(move || {
                    password::matches(&secret, stored.as_deref())
                });
                match (right.await, user) {
                    (Ok(true), Some(user)) => user,
                    _ => return Err(Refusal::BadCredentials),
                }
            }
        };
        self.tokens.give(&user.id, user.epoch).map_err(|error| {
            tracing::error!(%error, "cannot give a token");
            Refusal::BadCredentials
        })
    }
}

/// Makes sure that somebody can use the server: the chosen key, or on the very first start a
/// minted one, which is returned to be shown once.
///
/// # Errors
/// The store's.
pub async fn first_key(store: &Store, chosen: Option<String>) -> anyhow::Result<Option<String>> {
    let minted = store
        .call(move |c| {
            let transaction = c.transaction()?;
            let owner = match UserRow::by_name(&transaction, FIRST_USER)? {
                Some(user) => user.id,
                None => UserRow::insert(&transaction, FIRST_USER, None, "default")?,
            };
            let keys: i64 = transaction.query_row("SELECT count(*) FROM keys", [], |r| r.get(0))?;
            let (row, minted): (Option<NewKey>, _) = match chosen {
                // A key that was revoked stays revoked: its row is still there.
                Some(text) => (Some(key::row(&text, &owner, "bootstrap", None)), None),
                None if keys == 0 => {
                    let text = key::mint();
                    (Some(key::row(&text, &owner, "first", None)), Some(text))
                }
                None => (None, None),
            };
            if let Some(row) = row {
                row.insert(&transaction)?;
            }
            transaction.commit()?;
            Ok(minted)
        })
        .await?;
    Ok(minted)
}

#[cfg(test)]
mod tests;
