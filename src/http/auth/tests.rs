use super::*;
use crate::config::Config;
use crate::store::{KeyRow, PlanRow};

async fn auth(dir: &std::path::Path, store: &Store) -> Arc<Auth> {
    let config = Config::default();
    let tokens = Tokens::open(dir, 60).unwrap();
    Auth::start(store.clone(), tokens, &config.auth, config.default_plan)
        .await
        .unwrap()
}

#[tokio::test]
async fn the_first_key_is_minted_once() {
    let (dir, store) = crate::store::scratch();
    let key = first_key(&store, None).await.unwrap().unwrap();
    assert_eq!(first_key(&store, None).await.unwrap(), None);
    let auth = auth(dir.path(), &store).await;
    assert_eq!(auth.check(&key).unwrap().user.name, FIRST_USER);
    assert_eq!(auth.check("").unwrap_err(), Refusal::BadCredentials);
    assert_eq!(
        auth.check(&key[..key.len() - 1]).unwrap_err(),
        Refusal::BadCredentials
    );
    assert_eq!(
        auth.check(&key::mint()).unwrap_err(),
        Refusal::BadCredentials
    );
}

#[tokio::test]
async fn a_revoked_key_stops_working_and_a_chosen_one_stays_revoked() {
    let (dir, store) = crate::store::scratch();
    let chosen = "Zk3v9QpL0wTy7RbN";
    first_key(&store, Some(chosen.into())).await.unwrap();
    let auth = auth(dir.path(), &store).await;
    assert!(auth.check(chosen).is_ok());
    store
        .call(|c| KeyRow::revoke(c, &key::lookup("Zk3v9QpL0wTy7RbN")))
        .await
        .unwrap();
    auth.reload().await.unwrap();
    assert_eq!(auth.check(chosen).unwrap_err(), Refusal::BadCredentials);
    first_key(&store, Some(chosen.into())).await.unwrap();
    auth.reload().await.unwrap();
    assert_eq!(auth.check(chosen).unwrap_err(), Refusal::BadCredentials);
}

#[tokio::test]
async fn a_token_ends_with_the_password_it_was_given_for() {
    let (dir, store) = crate::store::scratch();
    let key = first_key(&store, None).await.unwrap().unwrap();
    let auth = auth(dir.path(), &store).await;
    let by_key = auth.log_in(FIRST_USER, &key).await.unwrap();
    assert_eq!(auth.check(&by_key).unwrap().user.name, FIRST_USER);
    assert_eq!(
        auth.log_in(FIRST_USER, "wrong").await.unwrap_err(),
        Refusal::BadCredentials
    );
    assert_eq!(
        auth.log_in("nobody", &key).await.unwrap_err(),
        Refusal::BadCredentials
    );

    let hash = password::hash("a long password").unwrap();
    store
        .call(move |c| UserRow::set_password(c, FIRST_USER, &hash))
        .await
        .unwrap();
    auth.reload().await.unwrap();
    assert_eq!(auth.check(&by_key).unwrap_err(), Refusal::BadCredentials);
    assert!(auth.log_in(FIRST_USER, "a long password").await.is_ok());
}

#[tokio::test]
async fn guessing_is_slowed_down() {
    let (dir, store) = crate::store::scratch();
    let key = first_key(&store, None).await.unwrap().unwrap();
    let auth = auth(dir.path(), &store).await;
    for _ in 0..10 {
        auth.log_in(FIRST_USER, &key).await.unwrap();
    }
    assert_eq!(
        auth.log_in(FIRST_USER, &key).await.unwrap_err(),
        Refusal::TooManyLogins
    );
}

#[tokio::test]
async fn a_plan_limits_requests_and_a_reload_does_not_refill_it() {
    let (dir, store) = crate::store::scratch();
    let key = first_key(&store, None).await.unwrap().unwrap();
    let plan = PlanRow {
        name: "default".into(),
        requests_per_minute: 1,
        burst: 2,
        max_vms: 7,
    };
    store.call(move |c| plan.set(c)).await.unwrap();
    let auth = auth(dir.path(), &store).await;
    let caller = auth.check(&key).unwrap();
    assert_eq!(caller.limits.max_vms, 7);
    assert_eq!((caller.spend(), caller.spend()), (Ok(()), Ok(())));
    let wait = caller.spend().unwrap_err();
    assert!((1..=60).contains(&wait), "{wait}");
    auth.reload().await.unwrap();
    assert!(auth.check(&key).unwrap().spend().is_err());
}

#[test]
fn the_key_header_wins_and_foreign_schemes_say_nothing() {
    let headers = |pairs: &[(&'static str, &'static str)]| {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.insert(*name, value.parse().unwrap());
        }
        map
    };
    let both = headers(&[("x-api-key", "k"), ("authorization", "Bearer t")]);
    assert_eq!(presented(&both), Presented::Secret("k"));
    assert_eq!(
        presented(&headers(&[("authorization", "bearer t")])),
        Presented::Secret("t")
    );
    assert_eq!(
        presented(&headers(&[("authorization", "Basic dTpw")])),
        Presented::Nothing
    );
    assert_eq!(presented(&headers(&[])), Presented::Nothing);
}
