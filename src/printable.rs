//! Text of strangers, made safe for a terminal.
//!
//! Names, metadata and configuration values come from files that nobody vouches for. Control
//! characters could drive the terminal, bidirectional marks could make one name look like another,
//! and zero-width characters could hide a difference. Everything that is printed goes through
//! [`printable`]. Reports in JSON keep the true characters, escaped by [`printable_json`]: JSON itself
//! demands that only of the first 32.

use std::borrow::Cow;

/// Longest piece of foreign text that is shown whole, in characters.
const SHOWN: usize = 4096;

/// Returns `text` with every character that could act on a terminal written as `\u{…}`, cut to
/// 4,096 characters.
///
/// Escaped are C0, DEL and C1 controls, line and paragraph separators, bidirectional marks,
/// zero-width and other invisible format characters.
///
/// ```
/// assert_eq!(loratool::printable("red\u{1b}[31m"), "red\\u{1b}[31m");
/// assert_eq!(loratool::printable("model.layers.0"), "model.layers.0");
/// ```
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.len() <= SHOWN && !text.chars().any(acts_on_a_terminal) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == SHOWN {
            shown.push('…');
            break;
        }
        if acts_on_a_terminal(character) {
            shown.extend(character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// Returns a JSON text with the same value in which no character could act on a terminal.
///
/// Line breaks between the values are kept. Outside its strings a JSON text has no other such
/// character, so all of them can be written as the escapes of JSON.
///
/// ```
/// assert_eq!(loratool::printable_json("{\"a\u{202e}\": \"\u{7f}\"}"), r#"{"a\u202e": "\u007f"}"#);
/// ```
pub fn printable_json(text: &str) -> Cow<'_, str> {
    let foul = |character| character != '\n' && acts_on_a_terminal(character);
    if !text.chars().any(foul) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if foul(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                shown.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// Whether a character must not reach a terminal as it is.
pub(crate) fn acts_on_a_terminal(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}
