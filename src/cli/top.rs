//! `mirrorhub top`: the sources live in the terminal, with rates.
//!
//! One task draws; a thread reads keys. The terminal is put back however this ends.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::{cursor, execute, terminal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::Done;
use super::ask::{Asked, STATUS_PATIENCE, runtime};
use super::failure::{Failure, USAGE};
use super::locate::ConfigArgument;
use super::signals::{Signal, Signals};
use super::terminal::{Look, Terminal};
use super::top_view::{Key, Top};
use crate::control::message::Request;
use crate::status::document::StatusDocument;

/// Show the sources live, with rates: sort, look for, and see all of one
#[derive(Debug, Args)]
pub struct TopArguments {
    #[command(flatten)]
    config: ConfigArgument,
}

const EVERY: Duration = Duration::from_secs(1);
/// How often the thread that reads keys looks whether anybody still wants them.
const KEY_PATIENCE: Duration = Duration::from_millis(200);
const KEYS_WAITING_MAX: usize = 64;
const PAGE_ROWS: isize = 10;

/// Runs it until q, Ctrl-C or a signal.
pub fn run(arguments: &TopArguments, terminal: &Terminal) -> Result<Done, Failure> {
    if !terminal.out.tty || !std::io::stdin().is_terminal() {
        let what = "top: this is no terminal".to_owned();
        let next = "`mirrorhub status --watch` writes to files and pipes".to_owned();
        return Err(Failure::Message { code: USAGE, what, next });
    }
    let asked = Asked::of(&arguments.config)?;
    let screen = Screen::enter().map_err(|error| unusable(&error))?;
    let ended = runtime()?.block_on(live(&asked, terminal.out));
    drop(screen);
    ended.map(|()| Done::WELL)
}

fn unusable(error: &std::io::Error) -> Failure {
    Failure::failed(format!("top: the terminal cannot be used: {error}"), "`mirrorhub status` can")
}

/// The terminal as it is needed here; as it was when this is dropped.
struct Screen;

impl Screen {
    fn enter() -> std::io::Result<Self> {
        terminal::enable_raw_mode()?;
        let screen = Self;
        execute!(std::io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let left = execute!(std::io::stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        if let Err(error) = left.and_then(|()| terminal::disable_raw_mode()) {
            tracing::warn!(%error, "the terminal stays as it is: `reset` puts it right");
        }
    }
}

/// What comes from the keyboard.
enum Input {
    Key(Key),
    Resized,
    Quit,
}

#[expect(clippy::wildcard_enum_match_arm, reason = "all other keys do nothing")]
fn input(event: &Event) -> Option<Input> {
    let key = match event {
        Event::Resize(..) => return Some(Input::Resized),
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        _ => return None,
    };
    let KeyEvent { code, modifiers, .. } = key;
    let key = match code {
        KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => {
            return Some(Input::Quit);
        }
        KeyCode::Char(letter) => Key::Letter(*letter),
        KeyCode::Up => Key::Move(-1),
        KeyCode::Down => Key::Move(1),
        KeyCode::PageUp => Key::Move(-PAGE_ROWS),
        KeyCode::PageDown => Key::Move(PAGE_ROWS),
        KeyCode::Home => Key::First,
        KeyCode::End => Key::Last,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc | KeyCode::Left => Key::Back,
        KeyCode::Right => Key::Enter,
        KeyCode::Backspace => Key::Erase,
        _ => return None,
    };
    Some(Input::Key(key))
}

/// Reads keys until nobody wants them.
fn read_keys(sender: &mpsc::Sender<std::io::Result<Input>>) {
    while !sender.is_closed() {
        let read = match event::poll(KEY_PATIENCE) {
            Ok(false) => continue,
            Ok(true) => event::read(),
            Err(error) => Err(error),
        };
        let failed = read.is_err();
        let Some(input) = read.map(|event| input(&event)).transpose() else { continue };
        if sender.blocking_send(input).is_err() || failed {
            return;
        }
    }
}

async fn live(asked: &Asked, look: Look) -> Result<(), Failure> {
    let mut signals = Signals::install().map_err(|error| unusable(&error))?;
    let (sender, mut keys) = mpsc::channel(KEYS_WAITING_MAX);
    std::thread::spawn(move || read_keys(&sender));
    let (begun, mut top) = (Instant::now(), Top::new(look));
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        draw(&top).map_err(|error| unusable(&error))?;
        tokio::select! {
            signal = signals.next() => if signal == Signal::Stop { return Ok(()) },
            key = keys.recv() => match key {
                Some(Ok(Input::Key(key))) => if !top.press(key) { return Ok(()) },
                Some(Ok(Input::Resized)) => {}
                Some(Ok(Input::Quit)) | None => return Ok(()),
                Some(Err(error)) => return Err(unusable(&error)),
            },
            _ = tick.tick() => {
                if !look_again(asked, &mut top, &mut keys, begun).await {
                    return Ok(());
                }
            }
        }
    }
}

/// Asks once, and goes on listening to keys meanwhile; `false` if one of them ends all.
async fn look_again(
    asked: &Asked,
    top: &mut Top,
    keys: &mut mpsc::Receiver<std::io::Result<Input>>,
    begun: Instant,
) -> bool {
    let request = Request::Status { source: None };
    let document =
        asked.ask::<StatusDocument>(&request, "status", Some(STATUS_PATIENCE), Look::PLAIN);
    let mut document = std::pin::pin!(document);
    loop {
        tokio::select! {
            document = &mut document => {
                match document {
                    Ok(document) => top.take(document, begun.elapsed()),
                    Err(failure) => top.failed(&failure.render(false)),
                }
                return true;
            }
            key = keys.recv() => {
                match key {
                    Some(Ok(Input::Key(key))) => if !top.press(key) { return false },
                    Some(Ok(Input::Resized)) => {}
                    Some(Ok(Input::Quit) | Err(_)) | None => return false,
                }
                if draw(top).is_err() {
                    return false;
                }
            }
        }
    }
}

fn draw(top: &Top) -> std::io::Result<()> {
    let (width, height) = terminal::size()?;
    let lines = top.lines(usize::from(width), usize::from(height));
    // Home, each line over the old one and cleared behind its end; none below is left.
    let text = lines.join("\x1b[K\r\n");
    let mut out = std::io::stdout().lock();
    write!(out, "\x1b[H{text}\x1b[K\x1b[J")?;
    out.flush()
}
