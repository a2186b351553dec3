//! Which CPs are kept by themselves: the newest, one an hour, one a day.
//!
//! Pure. What is kept is found by its name alone: `last-CP`, `hourly-YYYY-MM-DDtHH` and
//! `daily-YYYY-MM-DD`, in UTC. So a restart knows what a life before it has kept, and what a person
//! has named otherwise is never touched. Of an hour or a day the CP is kept that is published when
//! it is first looked at in it; if that is kept for an earlier one already, nothing was written
//! since, and the hour takes no place.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::discriminant;

use super::names::KeptName;
use super::numbers::CpNumber;

/// How many of each kind are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// The newest CPs.
    pub last: u32,
    /// The first CP of each of so many hours.
    pub hourly: u32,
    /// The first CP of each of so many days.
    pub daily: u32,
    /// Whether the oldest of them are given up when the pool has no room for a CP.
    pub drop_when_full: bool,
}

/// What a name of this module stands for. By kind, then by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// Of the newest CPs.
    Last(CpNumber),
    /// Of an hour: hours since 1970.
    Hourly(i64),
    /// Of a day: days since 1970.
    Daily(i64),
}

/// What is to be done now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Names that are to keep the published CP.
    pub keep: Vec<KeptName>,
    /// Names that are to be dropped, the oldest first.
    pub drop: Vec<KeptName>,
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { last, hourly, daily, drop_when_full } = self;
        write!(f, "last {last}, hourly {hourly}, daily {daily}")?;
        if *drop_when_full { f.write_str(", dropped when full") } else { Ok(()) }
    }
}

const HOUR_SECONDS: i64 = 3600;
const DAY_SECONDS: i64 = 86_400;

impl Slot {
    /// What a name stands for; `None` if a person has chosen it.
    pub fn of(name: &KeptName) -> Option<Self> {
        let slot = Self::parse(name.as_str())?;
        // One name a slot: `last-007` is a person's.
        (slot.name().as_ref() == Some(name)).then_some(slot)
    }

    fn parse(name: &str) -> Option<Self> {
        let (kind, rest) = name.split_once('-')?;
        match kind {
            "last" => Some(Self::Last(CpNumber(rest.parse().ok()?))),
            "hourly" => {
                let (day, hour) = rest.split_once('t')?;
                let hour: i64 = hour.parse().ok().filter(|hour| (0..24).contains(hour))?;
                Some(Self::Hourly(day_of(day)? * 24 + hour))
            }
            "daily" => Some(Self::Daily(day_of(rest)?)),
            _ => None,
        }
    }

    /// Its name; `None` far outside of our time.
    pub fn name(self) -> Option<KeptName> {
        let text = match self {
            Self::Last(cp) => format!("last-{}", cp.0),
            Self::Hourly(hour) => {
                format!("hourly-{}t{:02}", date_of(hour.div_euclid(24))?, hour.rem_euclid(24))
            }
            Self::Daily(day) => format!("daily-{}", date_of(day)?),
        };
        text.parse().ok()
    }
}

fn day_of(text: &str) -> Option<i64> {
    let date: jiff::civil::Date = text.parse().ok()?;
    let begin = date.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    Some(begin.timestamp().as_second().div_euclid(DAY_SECONDS))
}

fn date_of(day: i64) -> Option<jiff::civil::Date> {
    let begin = jiff::Timestamp::from_second(day.checked_mul(DAY_SECONDS)?).ok()?;
    Some(begin.to_zoned(jiff::tz::TimeZone::UTC).date())
}

impl Retention {
    /// What is to be done when `cp` is published, at `now` (seconds since 1970), with these CPs
    /// kept.
    pub fn plan(&self, now: i64, cp: CpNumber, kept: &[(KeptName, CpNumber)]) -> Plan {
        let mut plan = Plan::default();
        let slots = kept.iter().filter_map(|(name, cp)| Some((Slot::of(name)?, *cp)));
        let here: BTreeMap<Slot, CpNumber> = slots.collect();
        let (hour, day) = (now.div_euclid(HOUR_SECONDS), now.div_euclid(DAY_SECONDS));
        let kinds = [
            (self.last, Slot::Last(cp)),
            (self.hourly, Slot::Hourly(hour)),
            (self.daily, Slot::Daily(day)),
        ];
        for (count, new) in kinds {
            let mut all = here.clone();
            all.retain(|slot, _| discriminant(slot) == discriminant(&new));
            // CP 0 has nothing to keep.
            if count > 0 && cp.0 > 0 && !all.values().any(|kept| *kept == cp) {
                all.entry(new).or_insert(cp);
            }
            let over = all.len().saturating_sub(usize::try_from(count).unwrap_or(usize::MAX));
            // A new one that is older than all that is wanted (a clock was set back) is not kept.
            for (at, slot) in all.keys().enumerate() {
                let Some(name) = slot.name() else { continue };
                match (here.contains_key(slot), at < over) {
                    (true, true) => plan.drop.push(name),
                    (false, false) => plan.keep.push(name),
                    (true, false) | (false, true) => {}
                }
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 21 November 2026, 15:03:20 UTC.
    const NOW: i64 = 1_795_273_400;

    fn names(names: &[&str]) -> Vec<KeptName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    /// Kept CPs, `@` before the number.
    fn kept(kept: &[&str]) -> Vec<(KeptName, CpNumber)> {
        let one = |text: &&str| {
            let (name, cp) = text.split_once('@').unwrap();
            (name.parse().unwrap(), CpNumber(cp.parse().unwrap()))
        };
        kept.iter().map(one).collect()
    }

    #[test]
    fn names_say_what_they_are_and_one_name_stands_for_one_slot() {
        for (slot, name) in [
            (Slot::Last(CpNumber(12)), "last-12"),
            (Slot::Hourly(NOW / HOUR_SECONDS), "hourly-2026-11-21t15"),
            (Slot::Daily(NOW / DAY_SECONDS), "daily-2026-11-21"),
            (Slot::Daily(0), "daily-1970-01-01"),
        ] {
            assert_eq!(slot.name().unwrap().as_str(), name);
            assert_eq!(Slot::of(&name.parse().unwrap()), Some(slot));
        }
        for other in [
            "monday",
            "last",
            "last-x",
            "last-007",
            "last-99999999999",
            "hourly-2026-11-21t24",
            "hourly-2026-11-21t5",
            "daily-2026-02-30",
            "daily-20261121",
            "weekly-2026-11-21",
            "before-failover-3",
        ] {
            assert_eq!(Slot::of(&other.parse().unwrap()), None, "{other}");
        }
        assert_eq!(Slot::Daily(i64::MAX).name(), None);
    }

    #[test]
    fn the_first_of_each_is_kept_and_the_oldest_goes() {
        let retention = Retention { last: 2, hourly: 2, daily: 1, drop_when_full: false };
        let plan = retention.plan(NOW, CpNumber(9), &[]);
        assert_eq!(plan.keep, names(&["last-9", "hourly-2026-11-21t15", "daily-2026-11-21"]));
        assert!(plan.drop.is_empty());

        // The same hour again: only the newest CPs move on.
        let here = kept(&["last-8@8", "last-9@9", "hourly-2026-11-21t15@9", "daily-2026-11-21@9"]);
        let plan = retention.plan(NOW + 60, CpNumber(10), &here);
        assert_eq!(plan, Plan { keep: names(&["last-10"]), drop: names(&["last-8"]) });
        // Nothing new: nothing to do, also when hours and days go by.
        let here =
            kept(&["last-9@9", "last-10@10", "hourly-2026-11-21t15@10", "daily-2026-11-21@10"]);
        for later in [120, HOUR_SECONDS, 40 * DAY_SECONDS] {
            assert_eq!(retention.plan(NOW + later, CpNumber(10), &here), Plan::default());
        }
        // What was published in the hour before is what this one begins with.
        let here =
            kept(&["last-9@9", "last-10@10", "hourly-2026-11-21t15@9", "daily-2026-11-21@9"]);
        let plan = retention.plan(NOW + HOUR_SECONDS, CpNumber(10), &here);
        assert_eq!(plan, Plan { keep: names(&["hourly-2026-11-21t16"]), drop: vec![] });
        // Days later, whatever lies between: the newest hours and the newest day stay.
        let here = kept(&[
            "hourly-2026-11-21t15@9",
            "hourly-2026-11-21t14@7",
            "daily-2026-11-21@7",
            "monday@3",
        ]);
        let plan = retention.plan(NOW + 3 * DAY_SECONDS, CpNumber(11), &here);
        let keep = names(&["last-11", "hourly-2026-11-24t15", "daily-2026-11-24"]);
        assert_eq!(plan, Plan { keep, drop: names(&["hourly-2026-11-21t14", "daily-2026-11-21"]) });
    }

    /// A person's names are never in a plan, and what nobody wants any more goes.
    #[test]
    fn what_a_person_named_stays() {
        let here = kept(&["monday@1", "last-007@7", "last-7@7", "daily-2026-11-20@7"]);
        let plan = Retention::default().plan(NOW, CpNumber(9), &here);
        assert_eq!(plan, Plan { keep: vec![], drop: names(&["last-7", "daily-2026-11-20"]) });
    }

    /// With a clock that was set back the new CP would be the oldest: it is not kept, and above all
    /// not kept and dropped again and again.
    #[test]
    fn a_clock_that_was_set_back_drops_nothing() {
        let retention = Retention { last: 0, hourly: 0, daily: 2, drop_when_full: false };
        let here = kept(&["daily-2026-12-01@4", "daily-2026-12-02@5"]);
        assert_eq!(retention.plan(NOW, CpNumber(9), &here), Plan::default());
    }

    #[test]
    fn before_the_first_cp_there_is_nothing() {
        let all = Retention { last: 9, hourly: 9, daily: 9, drop_when_full: false };
        assert_eq!(all.plan(NOW, CpNumber(0), &[]), Plan::default());
    }
}
