//! The places at a door for those who have not been let in yet, and who of them makes room for a newer one.
//!
//! Used by the doors for sources, NBD and HTTP. Nobody waits for a place: when all are held, one of those who
//! wait makes room, never one who is inside. It is the oldest of the host that holds the most places: who opens
//! many takes them from himself. Regulars, who were inside before, go last; with more than a quarter of all
//! places a host is a stranger again, so none of them keeps the others out either. Hosts of IPv6 are told apart by
//! their network of 64 bits, in which one machine has any number of addresses.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// A host that holds more than this part of the places is no regular.
const REGULAR_SHARE: usize = 4;

/// How many connections the kernel holds that nobody has taken yet, as far as `net.core.somaxconn` lets it:
/// behind a restart of the hub all sources come at once, and whom the kernel turns away tries again after 1 s.
const PENDING_MAX: u32 = 4096;

/// Listens there.
///
/// # Errors
/// Somebody else does; it is no address of this machine.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Else a restart waits until the last connections of the process before have been forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(PENDING_MAX)
}

/// A door with its places.
#[derive(Debug)]
pub struct Entrance {
    places_max: usize,
    regulars_max: usize,
    state: Mutex<State>,
    /// A place has become free.
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Counts those who come, and those who become regulars.
    clock: u64,
    /// By the order in which they came.
    waiting: BTreeMap<u64, Waiter>,
    /// Those who have a place for as long as they want.
    inside: usize,
    /// Who was inside, and when for the last time.
    regulars: BTreeMap<IpAddr, u64>,
}

#[derive(Debug)]
struct Waiter {
    host: Host,
    is_regular: bool,
    since: Instant,
    room: CancellationToken,
}

/// What counts as one host; none is this machine, over a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Host(Option<IpAddr>);

impl Host {
    fn of(address: Option<IpAddr>) -> Self {
        Self(address.map(|address| match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
            v4 @ IpAddr::V4(_) => v4,
        }))
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn held_by(&self, host: Host) -> usize {
        self.waiting.values().filter(|waiter| waiter.host == host).count()
    }

    /// Who makes room next.
    fn first_to_go(&self, places_max: usize) -> Option<u64> {
        let mut held: BTreeMap<Host, usize> = BTreeMap::new();
        for waiter in self.waiting.values() {
            *held.entry(waiter.host).or_default() += 1;
        }
        let few = (places_max / REGULAR_SHARE).max(1);
        let rank = |waiter: &Waiter| {
            let held = held.get(&waiter.host).copied().unwrap_or_default();
            (waiter.is_regular && held <= few, Reverse(held))
        };
        // Of equals the first is taken, which is the oldest.
        self.waiting.iter().min_by_key(|(_, waiter)| rank(waiter)).map(|(number, _)| *number)
    }
}

impl Entrance {
    /// A door of so many places, which remembers so many addresses.
    pub fn new(places_max: usize, regulars_max: usize) -> Self {
        let (state, freed) = Default::default();
        Self { places_max, regulars_max, state, freed }
    }

    /// A place, for which another may have to make room at once; where only regulars wait, a stranger that
    /// comes is itself the one. None if all places are held by those inside.
    pub fn admit(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Place> {
        let mut state = self.lock();
        (state.inside < self.places_max).then(|| self.take(&mut state, address))
    }

    /// A place for somebody who can wait for it: who holds as many as others leaves them theirs for at least
    /// `grace`. So a crowd of good ones is served in turn, and who holds the most places gives way at once.
    pub async fn turn(self: &Arc<Self>, address: Option<IpAddr>, grace: Duration) -> Place {
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            let wait = {
                let mut state = self.lock();
                match self.wait(&state, Host::of(address), grace) {
                    None => return self.take(&mut state, address),
                    Some(wait) => wait,
                }
            };
            tokio::select! {
                () = freed => (),
                () = sleep(wait) => (),
            }
        }
    }

    /// How many have not been let in yet.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Somebody from there was let in: it is a regular, until so many others are.
    pub fn remember(&self, address: IpAddr) {
        let mut state = self.lock();
        let now = state.tick();
        state.regulars.insert(address.to_canonical(), now);
        if state.regulars.len() > self.regulars_max {
            let longest_ago = state.regulars.iter().min_by_key(|(_, when)| **when).map(|r| *r.0);
            longest_ago.and_then(|address| state.regulars.remove(&address));
        }
    }

    /// How long somebody from there leaves the others their places.
    fn wait(&self, state: &State, host: Host, grace: Duration) -> Option<Duration> {
        if state.waiting.len() + state.inside < self.places_max {
            return None;
        }
        let first = state.first_to_go(self.places_max)?;
        let first = state.waiting.get(&first)?;
        if state.held_by(first.host) > state.held_by(host) + 1 {
            return None;
        }
        let left = grace.saturating_sub(first.since.elapsed());
        (!left.is_zero()).then_some(left)
    }

    fn take(self: &Arc<Self>, state: &mut State, address: Option<IpAddr>) -> Place {
        let (number, room) = (state.tick(), CancellationToken::new());
        let regulars = &state.regulars;
        let waiter = Waiter {
            host: Host::of(address),
            is_regular: address.is_none_or(|at| regulars.contains_key(&at.to_canonical())),
            since: Instant::now(),
            room: room.clone(),
        };
        state.waiting.insert(number, waiter);
        while state.waiting.len() + state.inside > self.places_max {
            let first = state.first_to_go(self.places_max);
            let Some(gone) = first.and_then(|first| state.waiting.remove(&first)) else { break };
            gone.room.cancel();
        }
        Place { entrance: Arc::clone(self), number, room, is_inside: false }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place at an [`Entrance`]; dropped, it is free.
#[derive(Debug)]
pub struct Place {
    entrance: Arc<Entrance>,
    number: u64,
    room: CancellationToken,
    is_inside: bool,
}

impl Place {
    /// Returns when it has to make room: its holder goes.
    pub async fn lost(&self) {
        self.room.cancelled().await;
    }

    /// Its holder is let in and keeps it; or not, since it was to make room.
    pub fn enter(&mut self) -> bool {
        let mut state = self.entrance.lock();
        if state.waiting.remove(&self.number).is_some() {
            state.inside += 1;
            self.is_inside = true;
        }
        self.is_inside
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.entrance.lock();
        if self.is_inside {
            state.inside -= 1;
        } else if state.waiting.remove(&self.number).is_none() {
            // Another has it.
            return;
        }
        drop(state);
        self.entrance.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Option<IpAddr> {
        Some(address.parse().unwrap())
    }

    fn is_lost(place: &Place) -> bool {
        place.room.is_cancelled()
    }

    /// Goal: who opens many places takes them from himself, by host, and the oldest goes first; among hosts with
    /// one place each it is the oldest.
    #[test]
    fn the_oldest_of_the_host_with_the_most_places_makes_room() {
        let door = Arc::new(Entrance::new(4, 0));
        let one = door.admit(at("192.0.2.1")).unwrap();
        let many: Vec<_> = (0..10).map(|_| door.admit(at("192.0.2.2")).unwrap()).collect();
        assert!(!is_lost(&one) && door.waiting() == 4);
        let lost: Vec<_> = many.iter().map(is_lost).collect();
        assert_eq!(lost, [[true; 7].as_slice(), &[false; 3]].concat());
        // In one network of IPv6, and IPv4 as IPv6: each is one host.
        for (first, others) in [("2001:db8::", "2001:db8::"), ("192.0.2.7", "::ffff:192.0.2.7")] {
            let door = Arc::new(Entrance::new(3, 0));
            let one = door.admit(at("2001:db8:0:1::1")).unwrap();
            let first = door.admit(at(first)).unwrap();
            let others = [door.admit(at(others)).unwrap(), door.admit(at(others)).unwrap()];
            assert!(is_lost(&first) && !is_lost(&one) && !others.iter().any(is_lost));
        }
        let door = Arc::new(Entrance::new(2, 0));
        let all = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|host| door.admit(at(host)).unwrap());
        assert_eq!(all.each_ref().map(is_lost), [true, false, false]);
    }

    /// Goal: a regular stays where strangers are, from any number of hosts; one with more than its share is
    /// none; those remembered longest ago are forgotten. Control: the same host that is no regular goes first.
    #[test]
    fn regulars_go_last_unless_they_are_many() {
        for is_regular in [true, false] {
            let door = Arc::new(Entrance::new(8, 2));
            door.remember("198.51.100.9".parse().unwrap());
            for address in ["192.0.2.1", "192.0.2.9"].into_iter().filter(|_| is_regular) {
                door.remember(address.parse().unwrap());
            }
            assert_eq!(door.lock().regulars.len(), if is_regular { 2 } else { 1 });
            let one = door.admit(at("::ffff:192.0.2.1")).unwrap();
            let flood: Vec<_> =
                (0..250).map(|n| door.admit(at(&format!("203.0.113.{n}"))).unwrap()).collect();
            assert_eq!((is_lost(&one), is_lost(&flood[249])), (!is_regular, false));
            drop(flood);
            let many: Vec<_> = (0..8).map(|_| door.admit(at("192.0.2.9")).unwrap()).collect();
            let stranger = door.admit(at("203.0.113.7")).unwrap();
            assert!(is_lost(&many[0]) && !is_lost(&stranger));
        }
        // Two is a quarter: all are regulars, so the stranger is the one who goes.
        let door = Arc::new(Entrance::new(8, 8));
        let hosts = [1, 2, 3, 4].map(|n| format!("192.0.2.{n}"));
        hosts.iter().for_each(|host| door.remember(host.parse().unwrap()));
        let all: Vec<_> =
            hosts.iter().chain(&hosts).map(|host| door.admit(at(host)).unwrap()).collect();
        assert!(is_lost(&door.admit(at("203.0.113.7")).unwrap()) && !all.iter().any(is_lost));
    }

    /// Goal: who is inside makes room for nobody, and who had to make room does not come in.
    #[test]
    fn who_is_inside_stays() {
        let door = Arc::new(Entrance::new(2, 0));
        let mut one = door.admit(at("192.0.2.1")).unwrap();
        assert!(one.enter() && one.enter());
        let mut two = door.admit(at("192.0.2.1")).unwrap();
        let mut three = door.admit(at("192.0.2.1")).unwrap();
        assert!(is_lost(&two) && !two.enter() && !is_lost(&one) && three.enter());
        drop(two);
        assert!(door.admit(at("192.0.2.2")).is_none() && door.admit(None).is_none());
        drop(one);
        let mut four = door.admit(None).unwrap();
        assert!(four.enter() && door.admit(None).is_none());
        drop((three, four));
        let state = door.lock();
        assert_eq!((state.inside, state.waiting.len()), (0, 0));
    }

    /// Goal: a crowd leaves each its grace and is served in turn; of a host that holds the most nobody waits for
    /// the grace, and a place that becomes free is taken at once.
    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_served_in_turn() {
        let door = Arc::new(Entrance::new(2, 0));
        let grace = Duration::from_millis(250);
        let begun = Instant::now();
        let one = door.turn(at("192.0.2.1"), grace).await;
        let two = door.turn(at("192.0.2.1"), grace).await;
        assert!(begun.elapsed().is_zero());
        let other = door.turn(at("192.0.2.2"), grace).await;
        assert!(begun.elapsed().is_zero(), "it waited for a host that holds all of them");
        assert!(is_lost(&one) && !is_lost(&two));
        let third = door.turn(at("192.0.2.3"), grace).await;
        assert!(begun.elapsed() >= grace && is_lost(&two), "{:?}", begun.elapsed());
        let begun = Instant::now();
        let (_, fourth) = tokio::join!(async { drop(third) }, door.turn(at("192.0.2.3"), grace));
        assert!(begun.elapsed().is_zero() && !is_lost(&fourth) && !is_lost(&other));
    }
}
