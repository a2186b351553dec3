//! Goal: whatever is done in whatever order, with power cuts between, each source's logs hold a
//! prefix of its history with everything synced in it, and exactly the bytes that were appended.
//!
//! Method: proptest runs operations on a store over a file system that forgets, and on a plain
//! list a source. The list plays the ring as well: after a power cut everything behind what
//! recovery found is appended again.

use proptest::prelude::*;

use super::super::sim::Op;
use super::*;

const FAILING: &[Op] =
    &[Op::Write, Op::ShortWrite, Op::Allocate, Op::Create, Op::Writeback, Op::SyncDir];

#[derive(Debug, Clone)]
enum Step {
    Append { source: usize, bytes: usize },
    NextCp { source: usize },
    Sync { sources: u8 },
    Writeback { source: usize },
    Apply { source: usize },
    Cut { source: usize, back: usize },
    PowerCut { seed: u64 },
    Kill,
    Read { source: usize },
    Fault { source: usize, op: Op },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let source = 0usize..3;
    let step = prop_oneof![
        6 => (source.clone(), prop_oneof![1usize..600, 4000usize..9000])
            .prop_map(|(source, bytes)| Step::Append { source, bytes }),
        2 => source.clone().prop_map(|source| Step::NextCp { source }),
        2 => (1u8..8).prop_map(|sources| Step::Sync { sources }),
        2 => source.clone().prop_map(|source| Step::Writeback { source }),
        1 => source.clone().prop_map(|source| Step::Apply { source }),
        1 => (source.clone(), 0usize..4).prop_map(|(source, back)| Step::Cut { source, back }),
        2 => any::<u64>().prop_map(|seed| Step::PowerCut { seed }),
        1 => Just(Step::Kill),
        1 => source.clone().prop_map(|source| Step::Read { source }),
        1 => (source, prop::sample::select(FAILING)).prop_map(|(source, op)| Step::Fault { source, op }),
    ];
    prop::collection::vec(step, 1..60)
}

/// What one source is known to have sent, and what the hub was told of it.
#[derive(Debug)]
struct Model {
    id: SourceId,
    line: Line,
    cp: u32,
    /// The whole history, also of applied CPs.
    history: Vec<Transfer>,
    /// That many are synced at least.
    synced: usize,
    applied: u32,
}

impl Model {
    fn new(n: u8) -> Self {
        let line = Line::new(u64::from(n));
        Self { id: source(n), line, cp: 1, history: Vec::new(), synced: 0, applied: 0 }
    }

    fn index(&self, wanted: &Place) -> usize {
        if *wanted == Place::default() {
            return 0;
        }
        let at = self.history.iter().position(|transfer| place(transfer) == *wanted);
        at.expect("a place of this history") + 1
    }

    /// Transfers of CPs that are not applied come behind this many.
    fn applied_count(&self) -> usize {
        self.history.iter().filter(|t| t.header().cp.0 <= self.applied).count()
    }
}

struct Bench {
    files: SimFiles,
    store: LogStore,
    models: Vec<Model>,
}

impl Bench {
    fn new() -> Self {
        let files = SimFiles::default();
        let models: Vec<Model> = (1..=3).map(Model::new).collect();
        let store = Self::open(&files);
        for model in &models {
            store.recover(model.id, CpNumber(0)).unwrap();
        }
        Self { files, store, models }
    }

    fn open(files: &SimFiles) -> LogStore {
        store_with(files, LogOptions { files_open_max: 2, ..options() })
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Append { source, bytes } => {
                let model = &mut self.models[*source];
                let transfer = model.line.write(model.cp, 4096, *bytes);
                append(&self.store, model.id, &transfer);
                model.history.push(transfer);
            }
            Step::NextCp { source } => self.models[*source].cp += 1,
            Step::Sync { sources } => self.sync(*sources),
            // Whatever it begins: nothing is known to be durable that was not.
            Step::Writeback { source } => {
                self.store.begin_writeback(self.models[*source].id, 1).unwrap();
            }
            Step::Apply { source } => {
                let model = &mut self.models[*source];
                // A CP is applied only after its last transfer; the newest stays open.
                if model.applied + 1 < model.cp {
                    model.applied += 1;
                    self.store.drop_through(model.id, CpNumber(model.applied)).unwrap();
                }
            }
            Step::Cut { source, back } => self.cut(*source, *back),
            Step::PowerCut { seed } => {
                let files = self.files.power_cut(&mut Chance::new(*seed), true);
                self.restart(files);
            }
            Step::Kill => self.restart(self.files.copy()),
            Step::Read { source } => self.read(*source),
            Step::Fault { source, op } => self.fault(*source, *op),
        }
    }

    fn sync(&mut self, wanted: u8) {
        let ids: Vec<SourceId> = (0u8..3)
            .filter(|n| wanted >> n & 1 == 1)
            .map(|n| self.models[usize::from(n)].id)
            .collect();
        for (id, result) in self.store.sync(&ids) {
            let model = self.models.iter_mut().find(|model| model.id == id).unwrap();
            let place = result.unwrap();
            assert_eq!(place, self.store.synced(id));
            let last = self.store.last(id).unwrap_or_default();
            assert_eq!(place, last, "all appended before is synced");
            if place != Place::default() {
                model.synced = model.index(&place);
            }
        }
    }

    fn cut(&mut self, source: usize, back: usize) {
        let model = &mut self.models[source];
        let keep = model.history.len().saturating_sub(back).max(model.applied_count());
        if keep == 0 || keep == model.applied_count() {
            return;
        }
        let at = place(&model.history[keep - 1]);
        self.store.cut(model.id, at).unwrap();
        model.history.truncate(keep);
        model.synced = model.synced.min(keep);
        // The source comes back with another tail, in a new generation.
        model.line.place = at;
        model.line.generation += 1;
    }

    /// An append and a sync while `op` fails for one source. If that faulted it, the store is
    /// opened again, and what is missing is written from the ring.
    fn fault(&mut self, source: usize, op: Op) {
        let model = &mut self.models[source];
        let transfer = model.line.write(model.cp, 4096, 3000);
        self.files.fail(op, &model.id.to_string(), 28);
        let appended = self.store.append(model.id, EPOCH, &transfer).is_ok();
        // Where something has failed already, it is refused; one that fails now tells nobody yet.
        let sound = self.store.fault(model.id).is_none();
        assert_eq!(self.store.begin_writeback(model.id, 1).is_ok(), sound);
        model.history.push(transfer);
        let all: Vec<SourceId> = self.models.iter().map(|model| model.id).collect();
        for (n, (id, result)) in self.store.sync(&all).into_iter().enumerate() {
            let faulted = self.store.fault(id).is_some();
            assert_eq!(result.is_err(), faulted);
            assert!(!faulted || n == source, "a fault of {source} hit {n}");
            if let Ok(place) = result {
                let model = &mut self.models[n];
                model.synced = model.synced.max(model.index(&place));
            }
        }
        self.files.heal();
        let model = &self.models[source];
        if self.store.fault(model.id).is_none() {
            assert!(appended, "a failed append is a fault");
            return;
        }
        self.restart(self.files.copy());
    }

    fn restart(&mut self, files: SimFiles) {
        self.files = files;
        self.store = Self::open(&self.files);
        for model in &mut self.models {
            let found = self.store.recover(model.id, CpNumber(model.applied)).unwrap();
            assert!(found.damage().is_none(), "{:?}", found.damage());
            let applied = model.applied_count();
            let count = match found.last {
                Some(last) => model.index(&last).max(applied),
                None => applied,
            };
            assert!(count >= model.synced, "synced {} of which {count} are left", model.synced);
            assert!(self.store.synced(model.id).transfer.counter > 0 || model.synced <= applied);
            for transfer in &model.history[applied..] {
                let again = self.store.append(model.id, EPOCH, transfer).unwrap();
                let index = model.index(&place(transfer));
                assert_eq!(again == Appended::Repeated, index <= count);
            }
        }
        for source in 0..3 {
            self.read(source);
        }
    }

    /// Everything that is not applied is there, byte for byte.
    fn read(&self, source: usize) {
        let model = &self.models[source];
        let mut at = model.applied_count();
        for cp in self.store.cps(model.id) {
            let reader = self.store.reader(model.id, cp).unwrap();
            assert!(reader.damage().is_none(), "{:?}", reader.damage());
            for transfer in reader.transfers() {
                let transfer = transfer.unwrap();
                assert_eq!(transfer.id(), model.history[at].id());
                assert!(transfer.bytes() == model.history[at].bytes(), "{}", transfer.id());
                at += 1;
            }
        }
        assert_eq!(at, model.history.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn logs_agree_with_a_plain_list(steps in steps()) {
        let mut bench = Bench::new();
        for step in &steps {
            bench.run(step);
        }
        for source in 0..3 {
            bench.read(source);
        }
        assert!(bench.files.open_now_and_peak().1 <= 3);
    }
}
