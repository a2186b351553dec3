//! One life of one end: its tasks, its threads, and their end.
//!
//! All tasks of a process live in a local set of their own, so that a kill drops them at once; its
//! threads are those that were begun while it was current. A process that is paused has its tasks
//! and threads stand still, as SIGSTOP does.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::task::{JoinHandle, LocalSet};

use crate::units::machine::simulated::{Inside, Process, Threads};

/// A process that was begun.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) process: Process,
    task: JoinHandle<()>,
    pause: Rc<Pause>,
}

#[derive(Debug, Default)]
struct Pause {
    paused: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

struct Life {
    process: Process,
    pause: Rc<Pause>,
    inner: Pin<Box<dyn Future<Output = ()>>>,
}

impl Future for Life {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.pause.paused.get() {
            *self.pause.waker.borrow_mut() = Some(context.waker().clone());
            return Poll::Pending;
        }
        let _inside = Inside::of(self.process);
        self.inner.as_mut().poll(context)
    }
}

impl Running {
    /// Begins a process. Called on the simulation's own local set.
    pub(super) fn begin(process: Process, body: impl Future<Output = ()> + 'static) -> Self {
        let pause = Rc::<Pause>::default();
        let inner = Box::pin(async move {
            let local = LocalSet::new();
            local
                .run_until(async move {
                    body.await;
                    std::future::pending::<()>().await;
                })
                .await;
        });
        let task = tokio::task::spawn_local(Life { process, pause: Rc::clone(&pause), inner });
        Self { process, task, pause }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.pause.paused.get()
    }

    pub(super) fn pause(&self, paused: bool) {
        self.pause.paused.set(paused);
        let waker = self.pause.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Its tasks are dropped, its threads end where they wait.
    pub(super) async fn kill(self, threads: &Threads) {
        self.task.abort();
        // Cancelled is what it is meant to be.
        drop(self.task.await);
        threads.kill(self.process);
    }
}
