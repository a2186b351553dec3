//! Whatever a peer answers: an error that names the place, or the right tree. Never a wrong one.

use bytes::Bytes;
use proptest::prelude::*;

use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::write_set::Budget;
use crate::units::hash::ContentHash;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::error::TreePlace;
use crate::volume::pull::Puller;
use crate::volume::pull::error::PullError;
use crate::volume::pull::terms::{Put, Window};
use crate::volume::testing::{cp, data, pool_with, tree};
use crate::wire::message::{Frame, Message};
use crate::wire::pull::{AnswerDecoder, AnswerEncoder, AnswerError, Item, Pulled};

use super::pulling::{Fake, Go, SMALL, drive, fake_block, hand, pin, pull_into, served, target_of};

/// 20,000 blocks, height 3: every 100th holds something.
fn target() -> Fake {
    Fake::new((0..20_000).map(|vbn| u8::from(vbn % 100 == 0)).collect())
}

fn empty(blocks: usize) -> Fake {
    Fake::new(vec![0; blocks])
}

fn begin(target: &Fake) -> Puller<Fake> {
    Puller::new(empty(20_000), target.target(), Window::default(), 1).unwrap()
}

fn level_of(ask: &Message) -> u8 {
    if let Message::WantNodes(want) = ask { want.level } else { 0 }
}

/// Answers honestly until `lie` changes an answer. Returns the error, which must hold.
fn lied_to(mut lie: impl FnMut(&Message, Frame) -> (Frame, bool)) -> PullError {
    let target = target();
    let mut puller = begin(&target);
    let mut lied = false;
    let serve = |ask: &Message| {
        let honest = target.serve(ask);
        if lied {
            return honest;
        }
        let (frame, is_lie) = lie(ask, honest);
        lied = is_lie;
        frame
    };
    let driven = drive(&mut puller, Window::default(), serve, |put| {
        let Put::Data { vbn, block } = put else { panic!("{put:?}") };
        assert_eq!(**block, fake_block(vbn.0, 1), "a wrong block was yielded");
        Go::On
    });
    let error = driven.unwrap_err();
    // The first error holds: nothing is asked, nothing is taken, it is never finished.
    assert!(puller.asks().is_empty() && !puller.is_finished());
    let answer = Pulled { number: puller.next_number(), ..pulled() };
    assert_eq!(puller.nodes(&answer, &[0]).unwrap_err().to_string(), error.to_string());
    error
}

fn pulled() -> Pulled {
    Pulled { cp: CpNumber(3), volume: VolumeNumber(1), number: 1 }
}

fn with_payload(frame: &Frame, payload: Vec<u8>) -> Frame {
    let lengths = Message::decode(&frame.head[8..], 1).unwrap();
    Frame::new(&lengths, Bytes::from(payload))
}

/// Changes the payload of the first answer of that level.
fn payload_lie(level: u8, change: impl Fn(&mut Vec<u8>)) -> PullError {
    lied_to(|ask, frame| {
        if level_of(ask) != level {
            return (frame, false);
        }
        let mut payload = frame.payload.to_vec();
        change(&mut payload);
        (with_payload(&frame, payload), true)
    })
}

fn place(level: u8, index: u64) -> TreePlace {
    TreePlace { volume: VolumeNumber(1), level, index }
}

#[test]
fn a_flipped_bit_is_named_at_every_level() {
    let flip = |payload: &mut Vec<u8>| {
        let last = payload.len() - 1;
        payload[last] ^= 1;
    };
    let met = payload_lie(3, flip);
    assert!(matches!(&met, PullError::TopHash { place: p, .. } if *p == place(3, 0)), "{met}");
    assert!(met.to_string().starts_with("volume 1 level 3 index 0: "), "{met}");
    let met = payload_lie(2, flip);
    assert!(matches!(&met, PullError::NodeHash { place: p, .. } if *p == place(2, 1)), "{met}");
    let met = payload_lie(1, flip);
    assert!(matches!(&met, PullError::NodeHash { place: p, .. } if p.level == 1), "{met}");
    let met = payload_lie(0, flip);
    assert!(matches!(&met, PullError::BlockHash { place: p, .. } if *p == place(0, 3000)), "{met}");
}

#[test]
fn holes_in_place_of_what_was_promised_are_refused() {
    let no_children = |payload: &mut Vec<u8>| {
        let mut answer = AnswerEncoder::default();
        answer.node(&[ContentHash::ZERO; 128]);
        *payload = answer.finish();
    };
    assert!(matches!(payload_lie(3, no_children), PullError::TopHash { .. }));
    let met = payload_lie(2, no_children);
    assert!(matches!(&met, PullError::NodeHash { place: p, met, .. }
        if *p == place(2, 0) && met.is_zero()));
    let met = payload_lie(0, |payload| payload[1..4097].fill(0));
    assert!(matches!(&met, PullError::BlockHash { place: p, met, .. }
        if *p == place(0, 0) && met.is_zero()));
}

/// Right content in the wrong place is wrong content.
#[test]
fn answers_of_one_request_may_not_change_places() {
    let met = payload_lie(0, |payload| payload[..2 * 4097].rotate_left(4097));
    assert!(matches!(&met, PullError::BlockHash { place: p, .. } if *p == place(0, 0)), "{met}");
    let met = payload_lie(2, |payload| {
        let mut answer = AnswerDecoder::new(payload);
        let Ok(Item::Content(first)) = answer.node() else { panic!() };
        let Ok(Item::Content(second)) = answer.node() else { panic!() };
        let mut swapped = AnswerEncoder::default();
        swapped.node(&second);
        swapped.node(&first);
        *payload = swapped.finish();
    });
    assert!(matches!(&met, PullError::NodeHash { place: p, .. } if *p == place(2, 0)), "{met}");
}

#[test]
fn every_length_but_the_right_one_is_refused() {
    for level in 0..=3 {
        for cut in [1, 16, 17, 1000] {
            let met = payload_lie(level, |payload| {
                let rest = payload.len().saturating_sub(cut).max(1);
                payload.truncate(rest);
            });
            let PullError::Malformed { place, error: AnswerError::Short(_) } = met else {
                panic!("level {level}, {cut} cut: {met}");
            };
            assert_eq!(place.level, level);
        }
        let met = payload_lie(level, |payload| payload.push(0));
        let PullError::Malformed { error: AnswerError::Trailing(1), .. } = met else {
            panic!("level {level}: {met}");
        };
        let met = payload_lie(level, |payload| payload[0] = 77);
        let PullError::Malformed { error: AnswerError::Kind { at: 0, kind: 77 }, .. } = met else {
            panic!("level {level}: {met}");
        };
    }
}

#[test]
fn what_cannot_be_read_or_is_gone_is_told() {
    for level in 0..=3 {
        let met = payload_lie(level, |payload| *payload = vec![2]);
        assert!(matches!(&met, PullError::Unreadable { place } if place.level == level), "{met}");
        let met = payload_lie(level, |payload| *payload = vec![3]);
        assert!(matches!(met, PullError::Gone { cp: CpNumber(3), .. }), "{met}");
    }
}

#[test]
fn answers_nobody_asked_for_are_refused() {
    let target = target();
    let not_asked = |puller: &mut Puller<Fake>, frame: &Frame, wanted: Option<u64>| {
        let met = hand(puller, frame).unwrap_err();
        let is_it = matches!(&met, PullError::NotAsked { wanted: w, .. } if *w == wanted);
        assert!(is_it, "{met}, {wanted:?} was to be awaited");
    };
    let frame = |message: Message| Frame::new(&message, Bytes::from_static(&[2]));
    // Before anything was asked.
    not_asked(&mut begin(&target), &frame(Message::Nodes(pulled())), None);
    // Of another number, of another kind, of another CP or volume.
    for (message, kind) in [
        (Message::Nodes(Pulled { number: 2, ..pulled() }), 0),
        (Message::Nodes(Pulled { number: 0, ..pulled() }), 0),
        (Message::Blocks(pulled()), 1),
        (Message::Nodes(Pulled { cp: CpNumber(2), ..pulled() }), 2),
        (Message::Nodes(Pulled { volume: VolumeNumber(2), ..pulled() }), 2),
    ] {
        let mut puller = begin(&target);
        assert_eq!(puller.asks().len(), 1);
        let met = hand(&mut puller, &frame(message)).unwrap_err();
        let is_it = match kind {
            0 => matches!(met, PullError::NotAsked { wanted: Some(1), .. }),
            1 => matches!(met, PullError::OtherKind { number: 1, .. }),
            _ => matches!(met, PullError::OtherTarget { .. }),
        };
        assert!(is_it, "{met}");
    }
    // Twice.
    let mut puller = begin(&target);
    let top = target.serve(&puller.asks()[0]);
    hand(&mut puller, &top).unwrap();
    not_asked(&mut puller, &top, None);
    // Out of order: two requests are under way, the second is answered first.
    let mut puller = begin(&target);
    puller.asks();
    hand(&mut puller, &top).unwrap();
    let level_two = puller.asks();
    hand(&mut puller, &target.serve(&level_two[0])).unwrap();
    let level_one = puller.asks();
    assert!(level_one.len() >= 2, "{level_one:?}");
    not_asked(&mut puller, &target.serve(&level_one[1]), Some(3));
}

/// A target that has something behind its end is no volume, however well its hashes fit.
#[test]
fn a_target_that_goes_on_behind_its_end_is_refused() {
    let honest = Fake::new(vec![1; 130]);
    for (level, index, wanted) in [(0, 130, (place(1, 1), 2)), (1, 2, (place(2, 0), 2))] {
        let mut target = honest.clone();
        target.claim(level, index);
        let mut puller = Puller::new(empty(130), target.target(), SMALL, 1).unwrap();
        let driven = drive(&mut puller, SMALL, |ask| target.serve(ask), |_| Go::On);
        let met = driven.unwrap_err();
        assert!(
            matches!(&met, PullError::PastEnd { place, child } if (*place, *child) == wanted),
            "{met}"
        );
    }
}

/// What a lie does to one answer.
#[derive(Debug, Clone)]
enum Lie {
    Flip { at: prop::sample::Index, bit: u8 },
    Cut { at: prop::sample::Index },
    Add { byte: u8 },
    Again,
}

fn lie() -> impl Strategy<Value = Lie> {
    prop_oneof![
        6 => (any::<prop::sample::Index>(), 0..8u8).prop_map(|(at, bit)| Lie::Flip { at, bit }),
        1 => any::<prop::sample::Index>().prop_map(|at| Lie::Cut { at }),
        1 => any::<u8>().prop_map(|byte| Lie::Add { byte }),
        1 => Just(Lie::Again),
    ]
}

/// Few cases unless more are asked for.
fn config() -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if asked { config } else { ProptestConfig { cases: 48, ..config } }
}

proptest! {
    #![proptest_config(config())]

    /// Goal: one lie anywhere ends the pull with an error, and what was written until then is a
    /// sound start for the next pull.
    /// Method: real pools; the n-th answer is changed, then an honest peer goes on.
    #[test]
    fn a_lie_is_an_error_and_leaves_a_sound_work_tree(nth in 0..14usize, lie in lie()) {
        let ((_, own), (_, other)) =
            (pool_with(2 * POOL_BYTES_MIN, 20_000), pool_with(2 * POOL_BYTES_MIN, 20_000));
        let puts: Vec<_> = (0..150).map(|n| data(n * 113, (n % 5 + 1).to_le_bytes()[0])).collect();
        cp(&other, 1, &puts).unwrap();
        cp(&own, 1, &puts[50..60]).unwrap();
        let pin = pin(&other);
        let target = (target_of(&pin), SMALL);
        let mut set = own.begin(Budget::Ordinary);
        let (mut count, mut before) = (0, None);
        let came = pull_into(&mut set, (tree(&own), 2), target, usize::MAX, |ask| {
            let frame = served(&pin, ask);
            let mut payload = frame.payload.to_vec();
            let is_now = count == nth;
            count += 1;
            let honest = frame.clone();
            let answer = match &lie {
                _ if !is_now => frame,
                Lie::Flip { at, bit } => {
                    payload[at.index(frame.payload.len())] ^= 1 << bit;
                    with_payload(&frame, payload)
                }
                // A cut to nothing is refused where frames are read.
                Lie::Cut { at } => {
                    payload.truncate(1 + at.index(frame.payload.len() - 1));
                    with_payload(&frame, payload)
                }
                Lie::Add { byte } => {
                    payload.push(*byte);
                    with_payload(&frame, payload)
                }
                Lie::Again => before.take().unwrap_or(frame),
            };
            before = Some(honest);
            answer
        });
        prop_assert!(count > nth, "only {count} answers");
        prop_assert_eq!(came.error.is_some(), nth > 0 || !matches!(lie, Lie::Again));
        let again = pull_into(&mut set, (came.tree, 2), target, usize::MAX, |ask| served(&pin, ask));
        prop_assert!(again.error.is_none(), "{:?}", again.error);
        prop_assert_eq!(again.tree.root(), tree(&other).root());
    }
}
