use super::*;

#[derive(Clone, Default)]
struct Counted {
    retries: Retries,
    runs: Arc<AtomicUsize>,
}

impl Counted {
    /// Sends a request that takes a while, as a task that can be aborted like a connection.
    fn send(&self, same: Same, content: u8) -> tokio::task::JoinHandle<Answer> {
        let this = self.clone();
        tokio::spawn(async move {
            let runs = this.runs.clone();
            let start = || {
                Ok(async move {
                    let run = runs.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    Ok(Bytes::from(run.to_string()))
                })
            };
            this.retries.run(same, [content; 32], start, async {}).await
        })
    }

    fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }
}

fn body() -> Same {
    Same::Body(TenantId("t".into()), [1; 32])
}

fn named(name: &str) -> Same {
    Same::Named(TenantId("t".into()), "/execute", name.into())
}

#[tokio::test(start_paused = true)]
async fn a_repetition_joins_the_first_when_its_client_is_gone() {
    let counted = Counted::default();
    let first = counted.send(body(), 1);
    tokio::time::sleep(Duration::from_millis(10)).await;
    first.abort();
    assert!(first.await.is_err());
    let again = counted.send(body(), 1).await.unwrap().unwrap();
    assert_eq!((counted.runs(), again), (1, Bytes::from("0")));
}

#[tokio::test(start_paused = true)]
async fn two_clients_who_both_wait_get_two_runs() {
    let counted = Counted::default();
    let (a, b) = (counted.send(body(), 1), counted.send(body(), 1));
    a.await.unwrap().unwrap();
    b.await.unwrap().unwrap();
    assert_eq!(counted.runs(), 2);
    counted.send(body(), 1).await.unwrap().unwrap();
    assert_eq!(counted.runs(), 3, "a delivered answer is not kept");
    assert!(counted.retries.inner.open.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_answer_nobody_waited_for_is_kept_for_the_next_try_only_a_while() {
    let counted = Counted::default();
    let first = counted.send(body(), 1);
    tokio::time::sleep(Duration::from_millis(10)).await;
    first.abort();
    tokio::time::sleep(Duration::from_secs(2)).await;
    counted.send(body(), 1).await.unwrap().unwrap();
    assert_eq!(counted.runs(), 1);
    tokio::time::sleep(UNDELIVERED).await;
    counted.send(body(), 1).await.unwrap().unwrap();
    assert_eq!(counted.runs(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_named_request_runs_once_even_when_both_wait() {
    let counted = Counted::default();
    let (a, b) = (counted.send(named("k"), 1), counted.send(named("k"), 1));
    assert_eq!(a.await.unwrap().unwrap(), b.await.unwrap().unwrap());
    counted.send(named("k"), 1).await.unwrap().unwrap();
    assert_eq!(counted.runs(), 1);
    let other = counted.send(named("k"), 2).await.unwrap().unwrap_err();
    assert_eq!(other.status().as_u16(), 409);
    tokio::time::sleep(NAMED * 2).await;
    counted.send(named("k"), 2).await.unwrap().unwrap();
    assert_eq!(counted.runs(), 2);
}

#[tokio::test(start_paused = true)]
async fn places_are_taken_in_the_order_of_arrival() {
    let retries = Retries::default();
    let order = Arc::new(Mutex::new(Vec::new()));
    let send = |same: Same, name: &'static str| {
        let (retries, order) = (retries.clone(), order.clone());
        tokio::spawn(async move {
            let start = || {
                order.lock().unwrap().push(name);
                Ok(async {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    Ok(Bytes::new())
                })
            };
            retries.run(same, [1; 32], start, async {}).await
        })
    };
    let other = Same::Body(TenantId("t".into()), [2; 32]);
    let mut sent = Vec::new();
    for (same, name) in [(body(), "a"), (body(), "a again"), (other, "b")] {
        sent.push(send(same, name));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for request in sent {
        request.await.unwrap().unwrap();
    }
    assert_eq!(*order.lock().unwrap(), ["a", "a again", "b"]);
}

#[tokio::test(start_paused = true)]
async fn an_identical_request_goes_on_the_moment_the_first_has_ended() {
    let counted = Counted::default();
    let began = Instant::now();
    let first = counted.send(body(), 1);
    tokio::time::sleep(Duration::from_millis(70)).await;
    let second = counted.send(body(), 1);
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    // The first ends after 100 ms; the second takes 100 ms from then on.
    assert_eq!((counted.runs(), began.elapsed().as_millis()), (2, 200));
}

#[tokio::test(start_paused = true)]
async fn what_nobody_comes_for_is_cleaned_up_after_and_nothing_else_is() {
    let retries = Retries::default();
    let cleaned = Arc::new(AtomicUsize::new(0));
    let new = |number| Same::New(TenantId("t".into()), [number; 32]);
    let send = |same: Same| {
        let (retries, cleaned) = (retries.clone(), cleaned.clone());
        tokio::spawn(async move {
            let start = || {
                Ok(async {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    Ok(Bytes::new())
                })
            };
            let clean = async move {
                cleaned.fetch_add(1, Ordering::SeqCst);
            };
            retries.run(same, [1; 32], start, clean).await
        })
    };
    send(new(0)).await.unwrap().unwrap();
    for number in [1, 2] {
        let left = send(new(number));
        tokio::time::sleep(Duration::from_millis(10)).await;
        left.abort();
    }
    // One of the two comes again.
    tokio::time::sleep(Duration::from_secs(3)).await;
    send(new(1)).await.unwrap().unwrap();
    tokio::time::sleep(UNDELIVERED * 2).await;
    assert_eq!(cleaned.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn what_ran_is_not_run_again_even_when_its_answer_is_gone() {
    let retries = Retries::default();
    let runs = Arc::new(AtomicUsize::new(0));
    let send = |tenant: &str, name: String| {
        let (retries, runs) = (retries.clone(), runs.clone());
        let same = Same::Named(TenantId(tenant.into()), "/execute", name);
        async move {
            let start = || {
                Ok(async move {
                    runs.fetch_add(1, Ordering::SeqCst);
                    Ok(Bytes::from(vec![0; KEPT_BYTES / 8]))
                })
            };
            retries.run(same, [1; 32], start, async {}).await
        }
    };
    send("other", "first of all".into()).await.unwrap();
    for number in 0..12 {
        send("t", number.to_string()).await.unwrap();
    }
    let again = send("t", "0".into()).await.unwrap_err();
    assert_eq!(again.status().as_u16(), 409);
    assert!(send("t", "11".into()).await.is_ok());
    // Oldest, but somebody else has the most.
    assert!(send("other", "first of all".into()).await.is_ok());
    assert_eq!(runs.load(Ordering::SeqCst), 13);
    assert!(retries.kept().bytes() <= KEPT_BYTES);
}
