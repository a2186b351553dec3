//! The ring against a model: a list of what was given to it, what it said was committed, and what
//! was given up. Proptest finds and shrinks histories of append, commit, release, clean stop, kill
//! and power cut, the latter at any write of the next operations, recovery among them.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::device::sim::Effect;

#[derive(Debug, Clone)]
enum Op {
    /// Records of so many sectors join the queue.
    Append(Vec<usize>),
    /// The committer works until it has nothing or no room.
    Commit,
    /// So many of the committed records, from the oldest, are not needed any more.
    Release(usize),
    /// A clean end and a new opening.
    Reopen,
    /// The process dies between two calls; the cache of the device lives on.
    Kill,
    /// The power goes in the n-th write from now, and that seed says what survives.
    PowerCut(u64, u64),
    /// The n-th write from now fails, and the process is killed for it.
    WriteFails(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop::collection::vec(1usize..6, 1..5).prop_map(Op::Append),
        6 => Just(Op::Commit),
        4 => (0usize..8).prop_map(Op::Release),
        1 => Just(Op::Reopen),
        1 => Just(Op::Kill),
        2 => (0u64..8, any::<u64>()).prop_map(|(nth, seed)| Op::PowerCut(nth, seed)),
        1 => (0u64..8).prop_map(Op::WriteFails),
    ]
}

struct Model {
    sim: Arc<SimDevice>,
    driven: Driven,
    /// Committed and not given up, in order: position and ticket.
    live: Vec<(u64, u64)>,
    /// Committed and given up, the newest last; a crash may show them again.
    given_up: Vec<(u64, u64)>,
    /// Given to the ring and not said to be committed, in order.
    waiting: Vec<u64>,
    /// Which ticket a position was ever seen with, since something else was there.
    places: BTreeMap<u64, u64>,
    next_ticket: u64,
    cut_seed: u64,
}

impl Model {
    fn new(blocks: u64) -> Self {
        let sim = small_ring(blocks);
        let driven = drive(sim.clone()).unwrap();
        Self {
            sim,
            driven,
            live: vec![],
            given_up: vec![],
            waiting: vec![],
            places: BTreeMap::new(),
            next_ticket: 1,
            cut_seed: 0,
        }
    }

    /// Does `op`; `Err` means that the device failed and the process is gone.
    fn step(&mut self, op: &Op) -> Result<(), DeviceError> {
        match op {
            Op::Append(sizes) => {
                for sectors in sizes {
                    self.driven.feed.push(self.next_ticket, *sectors);
                    self.waiting.push(self.next_ticket);
                    self.next_ticket += 1;
                }
            }
            Op::Commit => {
                let result = loop {
                    match self.driven.committer.turn() {
                        Ok(Turn::Committed) => {}
                        Ok(Turn::Empty | Turn::NoRoom) => break Ok(()),
                        Err(error) => break Err(error),
                    }
                };
                self.learn();
                result?;
            }
            Op::Release(count) => {
                let gone: Vec<_> = self.live.drain(..(*count).min(self.live.len())).collect();
                self.given_up.extend(gone);
                let upto = match self.live.first() {
                    Some((position, _)) => LogPosition(*position),
                    None => self.driven.handle.status().durable,
                };
                self.driven.handle.release(upto);
            }
            Op::Reopen => {
                let result = self.driven.committer.finish();
                self.learn();
                result?;
                self.reopen();
            }
            Op::Kill => self.reopen(),
            Op::PowerCut(nth, seed) => {
                self.sim.forget_faults();
                self.sim.fail_change(*nth, Effect::PowerCut);
                self.cut_seed = *seed;
            }
            Op::WriteFails(nth) => {
                self.sim.forget_faults();
                self.sim.fail_change(*nth, Effect::Errno(5));
            }
        }
        self.check_cursors();
        Ok(())
    }

    /// Takes over what the feed was told.
    fn learn(&mut self) {
        let committed = std::mem::take(&mut self.driven.feed.queue().committed);
        for record in committed {
            assert_eq!(self.waiting.first(), Some(&record.ticket), "in the order given");
            self.waiting.remove(0);
            self.live.push((record.position.0, record.ticket));
        }
    }

    fn check_cursors(&self) {
        let status = self.driven.handle.status();
        assert_eq!(status, self.driven.handle.status_under_lock(), "what is shown is what is");
        assert!(
            status.released <= status.release_wanted && status.release_wanted <= status.durable
        );
        assert!(status.durable <= status.written);
        assert!(status.written.0 <= status.released.0 + status.capacity.0);
        if let Some((position, _)) = self.live.first() {
            assert!(status.released.0 <= *position, "space of a live record was released");
        }
    }

    /// The process is gone, perhaps the power too: opens until that succeeds, and compares.
    fn reopen(&mut self) {
        let mut attempts = 0;
        self.driven = loop {
            // A power cut in the middle of an opening is followed by another one.
            if self.sim.is_off() {
                self.cut_seed = self.cut_seed.wrapping_add(1);
                self.sim.power_cut(self.cut_seed);
                self.sim.power_on();
            }
            attempts += 1;
            assert!(attempts < 5, "an opening fails for ever");
            if let Ok(driven) = drive(self.sim.clone()) {
                break driven;
            }
        };
        self.compare();
    }

    fn compare(&mut self) {
        let recovery = &self.driven.recovery;
        assert_eq!(recovery.damage, vec![]);
        let found = &self.driven.found;
        // What was given up may show again, as a suffix of it.
        let old = found.iter().take_while(|(position, _)| match self.live.first() {
            Some((live, _)) => position < live,
            None => self.given_up.last().is_some_and(|(last, _)| position <= last),
        });
        let old = old.count();
        assert!(self.given_up.ends_with(&found[..old]), "{found:?} {:?}", self.given_up);
        // Then everything that is live, then some of what was under way, in order.
        let (live, new) = found[old..].split_at(self.live.len().min(found.len() - old));
        assert_eq!(live, self.live, "acknowledged records are lost");
        let tickets: Vec<u64> = new.iter().map(|(_, ticket)| *ticket).collect();
        assert!(self.waiting.starts_with(&tickets), "{tickets:?} {:?}", self.waiting);
        for (position, ticket) in found {
            // A place has one record until the ring comes round; a cut one is never seen later.
            let before = self.places.insert(*position, *ticket);
            assert!(before.is_none_or(|before| before == *ticket), "two records at {position}");
        }
        self.live.extend_from_slice(new);
        // What was not found was never acknowledged: it must not come back later.
        self.waiting.clear();
        self.given_up.clear();
        self.given_up.extend_from_slice(&found[..old]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: after any history every committed record that was not given up is found after each
    /// opening, in order and whole; and nothing is found that was not given, or was once cut.
    #[test]
    fn the_ring_agrees_with_the_model(
        blocks in 2u64..5,
        ops in prop::collection::vec(op(), 1..80),
    ) {
        let mut model = Model::new(blocks);
        for op in ops.iter().chain([&Op::Kill]) {
            if model.step(op).is_err() {
                model.reopen();
            }
        }
    }
}
