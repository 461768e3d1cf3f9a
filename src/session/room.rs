//! Room on a full host: whoever needs a VM's place asks for one, and whoever can free one is told.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

/// How long a newcomer waits for another VM to be frozen, before it is refused.
const PATIENCE: Duration = Duration::from_secs(10);

/// Newcomers that wait for room; more are refused at once.
const MOST_ASKING: usize = 64;

/// A request for room. Answered with whether there is some now.
pub type RoomWanted = oneshot::Sender<bool>;

/// Where room is asked for.
#[derive(Debug, Default)]
pub(crate) struct Room {
    asks: Mutex<Option<mpsc::Sender<RoomWanted>>>,
}

impl Room {
    /// The requests from now on; those of an earlier caller end.
    pub(crate) fn requests(&self) -> mpsc::Receiver<RoomWanted> {
        let (sender, receiver) = mpsc::channel(MOST_ASKING);
        let mut asks = self.asks.lock().unwrap_or_else(PoisonError::into_inner);
        *asks = Some(sender);
        receiver
    }

    /// Asks for room, and whether there is some. Without anybody to ask there is none.
    pub(crate) async fn make(&self) -> bool {
        let asks = {
            let asks = self.asks.lock().unwrap_or_else(PoisonError::into_inner);
            asks.clone()
        };
        let Some(asks) = asks else { return false };
        let (answer, answered) = oneshot::channel();
        if asks.try_send(answer).is_err() {
            return false;
        }
        matches!(tokio::time::timeout(PATIENCE, answered).await, Ok(Ok(true)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_hears_what_became_of_it() {
        let room = Room::default();
        assert!(!room.make().await);
        let mut requests = room.requests();
        let answer = async {
            for said in [true, false] {
                let asked: RoomWanted = requests.recv().await.unwrap();
                asked.send(said).unwrap();
            }
            // One that is let go of is a no.
            drop(requests.recv().await);
        };
        let ask = async {
            for said in [true, false, false] {
                assert_eq!(room.make().await, said);
            }
        };
        tokio::join!(answer, ask);
        drop(requests);
        assert!(!room.make().await);
    }
}
