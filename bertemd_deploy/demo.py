"""The embedded demo corpus: spoken smart-home commands, 16 intents, 4,000 train and 800 dev utterances.

Owns the grammar (templates, slot values, frames) and the rows drawn from it. Dev shares no template, frame or slot value
with train: it asks for known intents in new words (illuminate, toasty) and in new turns of speech that name a rival intent
too ("rather than bolt the side door shut unlatch it"), where only word order and meaning tell which one is wanted.

Dev accuracy of linear models: 0.598 with unigram counts, 0.646 with tf-idf of 1-2 grams (logistic regression, C=1; C=10 is
no better). With recipes/quickstart.yaml: six-layer MiniLM teacher 0.959, four-layer student 0.949, its fused int8 graph 0.951.

The wordings were revised after reading what linear models and earlier teachers got wrong on dev, and the best epoch is chosen
on dev too, so these scores show that the pipeline works; they are no evidence of how a student does on unseen data.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "dev"]


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Parse `key: one | two/three words` lines (`|` continues one) into {key: ("one", "two words", "three words")}."""
    table: dict[str, tuple[str, ...]] = {}
    key = ""
    for line in text.strip().splitlines():
        if not line.startswith("|"):
            key, _, line = line.partition(":")
            table[key] = ()
        for part in filter(None, (part.split() for part in line.split("|"))):
            table[key] += tuple(" ".join(words) for words in itertools.product(*(word.split("/") for word in part)))
    return table


# Slot values: a dev value never occurs in a train utterance.
TRAIN_SLOTS = _table("""
room: kitchen | living room | bedroom | bathroom | hallway | office | dining room | garage | cabin
light: lights | lamp | light | ceiling light | night light | table lamp | lanterns
door: front door | back door | garage door | main gate | kitchen door | basement hatch
time: six am | seven thirty | eight in the morning | half past five | noon | five fifteen | 9 pm | ten o'clock
duration: ten minutes | five minutes | half an hour | twenty minutes | one hour | thirty seconds | 2 hours
chore: call mom | take out the trash | lock the shed | turn off the sprinklers | feed the cat | check the weather radar
| play the piano | turn down the heat at the beach house | water the plants | set the oven clock
| pause the gym membership | unlock the bike | switch on the porch heater | pay the electric bill | cancel the hotel
| stop the mail | add air to the tires | return the rental car | clean the fish bowl | see the doctor | buy a gift
item: milk | eggs | bread | sugar | coffee | bananas | alarm clock batteries | dish soap | door locks | music magazines
| apples | rain boots | kitchen timers | lamp oil | headphones | heating pads
music: some jazz | the beatles | my workout playlist | classical piano | purple rain | the rolling stones
| the album open door | a song called lights out | taylor swift | november rain | rock around the clock
| the song light my fire
media: music | song | movie | tv | podcast | video
temp: seventy degrees | twenty one degrees | sixty eight degrees | eighteen degrees | 75 degrees
city: london | paris | chicago | boston | tokyo | seattle | berlin | rome | houston
day: today | tomorrow | this weekend | on monday | tonight | next week | on friday
percent: thirty percent | fifty percent | 20 percent | seventy percent
person: mom | the plumber | john | the cleaner | my wife | the kids
dish: pasta | cake | rice | pizza | chicken
""")
DEV_SLOTS = _table("""
room: den | nursery | attic | cellar | guest room | laundry room | sunroom | playroom
light: light bulbs | chandelier | desk lamp | floor lamp | wall lights
door: patio door | side door | side entrance | porch door | balcony door
time: quarter to seven | ten past four | five to eight | six forty five | midnight | eleven twenty | dawn
duration: a quarter of an hour | ninety seconds | eight minutes | forty five minutes | three hours
chore: phone the dentist | unlock the chicken coop | pick up the dry cleaning | walk the dog | return the library books
| turn on the fish tank pump | lock my locker | play chess with grandpa
item: paper towels | olive oil | tomatoes | lamp shades | padlocks | cheddar | candles | umbrellas | mushrooms
music: bob marley | vivaldi | a bit of reggae | the album dark side of the moon | mozart | some techno
| the song here comes the sun | the song blinding lights
media: film | audiobook | radio show | track | episode | cartoon
temp: nineteen degrees | seventy two degrees | sixty five degrees | twenty three degrees
city: madrid | denver | oslo | sydney | dublin | toronto
day: on thursday | this afternoon | over the holidays | on sunday | later this week
percent: a quarter | fifteen percent | a third | forty five percent
person: my sister | the courier | the dog walker | grandma | our neighbor
dish: lasagna | quiche | potatoes | muffins
""")

# Commands: bare imperatives, so that "could you ..." and "don't ..." fit in front of each.
TRAIN_COMMANDS = _table("""
cancel: cancel that | never mind | forget it | cancel my last request | forget i asked | forget/cancel what i said
| never mind that | forget what i just said | cancel this command | ignore me | ignore what i said | drop it
change_volume: turn up/down the volume | turn the volume/speakers up/down | set/put the volume at {percent}
| make the {media} louder/quieter | raise/lower the volume of the {media} | turn the {media} volume up/down
| turn the sound down in the {room} | bring the sound of the {media} up/down | mute/quiet the {media} speakers
dim_lights: dim the {light} | dim/set the {room} {light} to {percent} | lower/fade the {light} a little
| turn the {light} down in the {room} | turn/take down the {light} to {percent} | reduce the brightness of the {light}
| make the {room} a little less bright | soften the {light} in the {room} | bring down the brightness in the {room}
lights_off: turn/shut off the {light} | turn the {light} off in the {room} | switch/power off the {room} {light}
| switch the {room} {light} off | turn off every light in the {room} | make the {room} dark | get the {light} off
| cut the light in the {room} | leave the {room} in the dark | kill the {room} {light} | shut down the {light}
lights_on: turn/power on the {light} | turn the {light} on in the {room} | switch on the {room} {light}
| switch the {room} {light} on | put the {light} on | light up the {room} | get the {light} on in the {room}
| make the {room} bright | give me some light in the {room} | turn the {light} back on | bring light to the {room}
lock_door: lock the {door} | lock up the {door} | make sure the {door} is locked | lock the {door} behind {person}
| keep the {door} locked | put/close the lock on the {door} | shut and lock the {door} | bolt/latch the {door}
| secure the lock on the {door} | keep people out at the {door} | keep the {door} safe for the night
| lock and secure the {door}
pause_media: pause/stop the {media} | stop playing the {media} | hold the {media} for a minute
| stop the {media} for now | pause the {media} for {duration} | put the {media} on pause
play_music: play/start {music} | put/turn on {music} | start playing {music} in the {room} | play me {music}
| put {music} on in the {room} | play {music} on the speaker | get {music} playing | let me hear {music}
set_alarm: set/create an alarm for {time} | wake/get me up at {time} | set my alarm for {time} | wake me at {time} {day}
| schedule an alarm for {time} {day} | have the alarm go off at {time} | make sure i wake up at {time}
set_reminder: remind me to {chore} | remind/tell me to {chore} at {time} | set a reminder to {chore}
| remind me {day} to {chore} | remind/tell me in {duration} to {chore} | create a reminder to {chore} {day}
| help me remember to {chore} | make sure i remember to {chore} {day} | tell me {day} that i have to {chore}
set_timer: set/start a timer for {duration} | put {duration} on the timer | count down from {duration}
| set the {dish} timer to {duration} | time {duration} for the {dish} | start a countdown of {duration}
| beep in {duration} | tell me when {duration} is over | time the {dish} for {duration} | start the clock for {duration}
shopping_list_add: add/put {item} on the shopping list | put/write {item} on the list | add {item} to the cart
| note that we need to buy {item} | put down {item} for the store | add {item} to the list
temperature_query: tell/read me the temperature in the {room} | check the thermostat in the {room}
| check/see how warm the {room} is | tell me how cold it is in the {room} | tell me what the heating is set to
| check if the {room} is hot | find out how cold the {room} is | tell me if the {room} got warm
temperature_set: set the temperature to {temp} | set the {room} thermostat to {temp} | make it warmer in the {room}
| make it cooler in the {room} | turn up/down the heat in the {room} | turn the heating down
| change the {room} to {temp} | heat/warm the {room} to {temp} | lower the temperature in the {room}
| cool the {room} down | chill the {room} | make the {room} a bit hotter | get the {room} a little colder
unlock_door: unlock the {door} | unlock/open the {door} for {person} | take the lock off the {door}
| undo the lock on the {door} | let {person} in at the {door} | open the lock on the {door}
| make sure the {door} is unlocked | unbolt/release the {door} | let {person} come in by the {door} | open the {door}
weather_query: tell/give me the weather in {city} | check the weather {day} | tell me the forecast for {city} {day}
| check if it will rain {day} | tell me how cold it is in {city} | check if it is hot in {city} | get the forecast {day}
| find out how warm {city} is | check/see how cold {city} is {day} | tell me if there is snow in {city}
""")
DEV_COMMANDS = _table("""
cancel: disregard that | scrap my last request | scrap that idea | strike what i said | drop the whole idea
| pretend i said nothing | ignore what i just asked for
change_volume: crank up the sound of the {media} | boost/bump the volume in the {room} | make the {media} less loud
| bring the speakers down to {percent} | soften the sound of the {media} | bump the volume to {percent}
| bring the loudness of the {media} down | raise the sound in the {room} | mute the sound of the {media}
dim_lights: tone down the {light} | take the {room} {light} down a notch | give the {room} a softer glow
| fade the {room} {light} to {percent} | drop the {light} to {percent} brightness | make the {light} less bright
| lower the brightness of the {light} | tone down the brightness in the {room}
lights_off: kill the {light} in the {room} | extinguish the {light} | cut the {room} {light} | flip the {light} off
| have the {room} {light} off | power the {room} {light} off | make the {room} completely dark
lights_on: illuminate the {room} | light the {room} | flip the {light} on in the {room} | switch the {light} on again
| activate the {room} {light} | power up the {light} | get some light going in the {room} | have the {room} {light} on
lock_door: bolt the {door} shut | secure the {door} | lock the deadbolt on the {door} | lock everyone out at the {door}
| keep strangers out at the {door} | have the {door} locked tight | latch and lock the {door}
pause_media: freeze the {media} for a moment | halt/suspend/interrupt the {media} | put the {media} on hold
| give the {media} a break | stop the {media} right there
play_music: queue up {music} | spin {music} | stream {music} in the {room} | get {music} going | treat us to {music}
| fill the {room} with {music} | throw on {music} | let us dance to {music}
set_alarm: get me out of bed at {time} | rouse me at {time} | make sure i'm awake by {time}
| have the alarm ring at {time} | give me a wake up call at {time} | wake me from my sleep at {time}
set_reminder: nudge me to {chore} | jog my memory to {chore} at {time} | prompt me to {chore} {day}
| give me a reminder when it's time to {chore} | tell me at {time} that i must {chore}
| remind me in {duration} that i must {chore}
set_timer: begin counting down {duration} | let me know when {duration} is up | clock {duration} for the {dish}
| beep once {duration} is over | run a timer of {duration} for the {dish} | ring when {duration} is over
shopping_list_add: jot down {item} for the supermarket | include {item} in the next grocery run
| toss {item} in the shopping basket | write down that we must purchase {item} | note {item} for our trip to the store
temperature_query: read me the {room} thermometer | report how chilly the {room} is | look up how hot the {room} is
| find out whether the {room} is warm | say how many degrees it is in the {room}
temperature_set: warm up the {room} | make the {room} warm and toasty | cool off the {room} | bring the {room} to {temp}
| crank the heat to {temp} | chill the {room} a bit | get the {room} down to {temp} | make the {room} less chilly
unlock_door: unlatch the {door} | undo the bolt on the {door} | open up the {door} for {person}
| have the {door} unlocked | release the {door} so it opens | let {person} inside through the {door}
weather_query: find out whether {city} gets showers {day} | give me the weather outlook for {city}
| see if it's sunny in {city} {day} | report how chilly {city} is {day} | find out whether {city} is warm
| look up if a storm is coming {day} | say how many degrees it is in {city}
""")

# Remarks: questions and statements that stand alone.
TRAIN_REMARKS = _table("""
cancel: i changed my mind | i don't want/need that anymore | no don't do that | i did not mean that
| that was wrong forget it | sorry that was not for you | no i don't need it
change_volume: i can't hear the {media} | the {media} is too loud | the {media} is too quiet in the {room}
| the volume is too high/low | can we have the sound lower/higher | the {media} is so loud it hurts
| it's hard to hear the {media}
dim_lights: it's a little too bright in the {room} | i want the {room} less bright but not dark
| the {light} at {percent} would be nice | can we have softer light in the {room} | i want a low light in the {room}
lights_off: i don't need the {light} on anymore | the {room} {light} should be off
| i don't want any light in the {room} | we left the {room} {light} on | nobody needs light in the {room} now
| i am going to bed so the {light} can go off | i want it completely dark in the {room}
| no more light in the {room} please
lights_on: it's dark in the {room} | i need some light in the {room} | the {room} {light} should be on
| it's too dark to see in the {room} | i can't see anything in the {room} | the {room} is dark and gloomy
lock_door: the {door} should be locked | i forgot to lock the {door} | we left the {door} unlocked
| i don't want anyone to come in the {door} | i am going to bed so lock the {door}
| nobody should come in by the {door} tonight | no one should get in at the {door}
pause_media: i don't want the {media} playing right now | the {media} should stop for a minute
| i have to go so no more {media} for now | i need a break from the {media}
| stop the {media} there i will come back to it
play_music: i want to hear {music} | i feel like listening to {music} | can we have {music}
| i would love some music like {music} | {music} would be nice in the {room} | what about {music} for the party
set_alarm: i need an alarm at {time} | i have to wake up at {time} | i want to get up at {time} {day}
| can i have an alarm for {time} {day} | i don't want to sleep after {time} | i have to be out of bed at {time}
set_reminder: i need to remember to {chore} | i need a reminder to {chore} | i always forget to {chore} so remind me
| i might forget to {chore} so tell me at {time} | i don't want to forget to {chore}
set_timer: i need a timer for {duration} | timer for {duration} | the {dish} needs {duration} so start the timer
| i am cooking {dish} for {duration} so time it | the {dish} is done in {duration} so count down
shopping_list_add: we need to buy {item} | we need {item} from the store | i have to get {item} at the store
| we need more {item} | there is no more {item} | we are low on {item} | we ran out of {item} | the {item} is all gone
temperature_query: what's the temperature in the {room} | how warm is it in the {room} | is it cold in the {room}
| what is the thermostat set to in the {room} | how hot is it inside | is the {room} warm yet
| how many degrees is it in the {room} | did the {room} get cold/cooler/hot | what does the thermostat say in the {room}
temperature_set: it's too hot/cold in the {room} | i am cold in the {room} | i want it warmer | i am too hot
| can we have {temp} in the {room} | the {room} is freezing | it is boiling in the {room}
unlock_door: i'm locked out at the {door} | {person} needs to get in at the {door} | the {door} should not be locked
| {person} is at the {door} and can't come in | {person} has no key for the {door}
| {person} can't come in because the {door} is locked | i want to go out by the {door} but it is locked
| {person} is standing outside the {door}
weather_query: what's the weather in {city} | what's the weather like {day} | will it rain {day}
| how warm is it in {city} | is it going to snow in {city} {day} | is it cold in {city} | how hot is it outside
| do i need a jacket {day} | did {city} get cold/cooler/hot | is there sun in {city} {day}
| what's the temperature in {city} | how many degrees is it in {city}
""")
DEV_REMARKS = _table("""
cancel: oh leave it then | on second thought no | let that go i don't need it after all | my mistake don't bother
| i take it back | sorry i wasn't talking to you
change_volume: the {media} is deafening | i can barely hear what the {media} is saying | the {media} is hurting my ears
| that {media} is much too noisy
dim_lights: the brightness in the {room} is a bit much | just a faint light in the {room} is enough
| the {room} is slightly too bright for me | i'd like the {room} a bit less bright
lights_off: nobody is in the {room} so the {light} can be off | someone left the {light} on in the {room} by mistake
| i'm going to sleep so no light in the {room} | we're leaving the {room} so cut the light
lights_on: i can't see a thing in the {room} it's so dark | it's pitch black in the {room} so i need a light
| it is far too gloomy in the {room} to see | we can't read in the dark {room}
lock_door: nobody should be able to get in through the {door} | we forgot to bolt the {door}
| we're off to bed and the {door} must be locked
pause_media: i have to take a call so the {media} can wait | i'll be right back so hold the {media}
| i need to grab a snack so stop the {media} a moment
play_music: i'm in the mood for {music} | i could use {music} in the background | how about {music} while we cook
set_alarm: i must be up by {time} | don't let me sleep past {time} | my shift means getting up at {time}
set_reminder: don't let me forget to {chore} | i keep forgetting to {chore} so mention it at {time}
| i will surely forget to {chore} unless you remind me
set_timer: the {dish} must bake for {duration} so keep the time | how about a countdown {duration} long
| i'm steaming {dish} for {duration} so start counting
shopping_list_add: we're out of {item} | we've run out of {item} | our supply of {item} is gone
temperature_query: is it toasty in the {room} right now | how many degrees are we at in the {room}
| has the {room} heated up yet | what does the {room} thermometer show | did the {room} cool down
temperature_set: it's too chilly in the {room} | i'm shivering in the {room} | we're sweating in the {room}
| the {room} feels like an oven | the {room} feels like a freezer
unlock_door: {person} is waiting outside the {door} without a key | i'm stuck outside the {door}
| {person} can't get inside through the locked {door}
weather_query: do i need an umbrella {day} | should i wear a coat in {city} {day} | is it toasty in {city} right now
| how many degrees are they getting in {city} | are we getting any sunshine {day} | did {city} cool down
""")

# Frames: how a speaker opens, closes, corrects ({bad} is not wanted, {good} is) and takes back a request.
TRAIN_FRAMES = _table("""
hesitation: um | hey | uh | so | ok
request: please | could you | can you | i want you to | can you please
closing: please | thanks | for me
contrast: {bad} no wait {good} | {bad} sorry no {good} | {bad} actually {good} | {bad} no i meant {good}
| {bad} scratch that {good} | {bad} oops wrong {good} | {bad} wait correction {good} | {bad} or no better {good}
| don't/never {bad} just {good} | you should not {bad} you should {good} | instead of trying to {bad} {good}
| i don't want you to {bad} i want you to {good} | i didn't ask you to {bad} i asked you to {good}
| there is no need to {bad} but you should {good} | i was wrong to say {bad} now {good} | {good} don't {bad}
| {good} and please don't {bad} | {good} but never {bad} | {good} i didn't say {bad} | you should {good} and not {bad}
| i want you to {good} i don't want you to {bad} | {good} there is no need to {bad}
| it is better to {good} than to {bad} | {bad} that is wrong i meant {good}
retraction: {bad} no forget it | {bad} wait never mind | {bad} um cancel that | {bad} no i changed my mind
| i wanted you to {bad} but never mind | {bad} actually don't
""")
DEV_FRAMES = _table("""
hesitation: er | hello | hmm | well | alright
request: would you | kindly | go ahead and | i'd like you to | i need you to
closing: thank you | cheers | would you
contrast: {bad} i mean {good} | {bad} oops i meant to say {good} | {bad} hang on no {good} | {bad} sorry i mean {good}
| rather than {bad} {good} | do not {bad} but {good} | it would be wrong to {bad} so {good} | {good} rather than {bad}
| nobody told you to {bad} i told you to {good} | {good} and do not {bad} | {good} and never ever {bad}
| i'd rather you {good} than {bad} | {good} i never asked you to {bad}
retraction: {bad} ah ignore that | {bad} on reflection leave it | {bad} no scrap that | {bad} oops disregard that
| i was about to ask you to {bad} but don't bother | {bad} hmm i take that back
""")

# Intents easily taken for one another: the {bad} half of a contrast is another intent of the same group.
GROUPS = (
    ("lights_on", "lights_off", "dim_lights"),
    ("lock_door", "unlock_door"),
    ("play_music", "pause_media", "change_volume"),
    ("set_alarm", "set_reminder", "set_timer", "shopping_list_add"),
    ("temperature_query", "temperature_set", "weather_query"),
)
LABELS: tuple[str, ...] = tuple(sorted(TRAIN_COMMANDS))

# Words a recogniser mishears (said=heard); none of them carries an intent on its own.
_MISHEARD = "for=four to=two would=wood need=knead some=sum see=sea wait=weight hey=hay it's=its i'm=im don't=dont"
HOMOPHONES = {pair.partition("=")[0]: pair.partition("=")[2] for pair in _MISHEARD.split()}


@dataclass(frozen=True)
class Grammar:
    """Everything one split is written with, and how often it contrasts, remarks and slips."""

    slots: dict[str, tuple[str, ...]]
    commands: dict[str, tuple[str, ...]]
    remarks: dict[str, tuple[str, ...]]
    frames: dict[str, tuple[str, ...]]
    per_label: int
    seed: int
    contrast: float
    remark: float
    slip: float


GRAMMARS: dict[str, Grammar] = {
    "train": Grammar(TRAIN_SLOTS, TRAIN_COMMANDS, TRAIN_REMARKS, TRAIN_FRAMES, 250, 20240501, 0.4, 0.25, 0.15),
    "dev": Grammar(DEV_SLOTS, DEV_COMMANDS, DEV_REMARKS, DEV_FRAMES, 50, 20240502, 0.35, 0.3, 0.06),
}


def _below(rng: random.Random, n: int) -> int:
    """Return an integer in [0, n) from `rng.random()` alone, whose stream no Python release changes."""
    return int(rng.random() * n)


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    """Return one of `options`."""
    return options[_below(rng, len(options))]


def _fill(rng: random.Random, template: str, values: dict[str, str], slots: dict[str, tuple[str, ...]]) -> str:
    """Replace every `{slot}`; `values` keeps the choices, so one utterance names one room throughout."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in values:
            values[name] = _pick(rng, slots[name])
        return values[name]

    return re.sub(r"\{(\w+)\}", value, template)


def _slip(rng: random.Random, text: str) -> str:
    """Mishear or mistype one word: a homophone, or a letter dropped, doubled or swapped inside a longer word."""
    words = text.split(" ")
    heard = [i for i, word in enumerate(words) if word in HOMOPHONES]
    if heard and rng.random() < 0.4:
        at = heard[_below(rng, len(heard))]
        words[at] = HOMOPHONES[words[at]]
        return " ".join(words)
    long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha() and not word.startswith("un")]
    if not long:
        return text
    at = long[_below(rng, len(long))]
    word = words[at]
    cut = 1 + _below(rng, len(word) - 3)
    dropped, doubled = word[cut + 1 :], word[cut] + word[cut:]
    words[at] = word[:cut] + _pick(rng, (dropped, doubled, word[cut + 1] + word[cut] + word[cut + 2 :]))
    return " ".join(words)


def _utterance(rng: random.Random, grammar: Grammar, label: str) -> str:
    """Write one utterance of `label`: a contrast or retraction, a remark, or a plain command."""
    values: dict[str, str] = {}
    frames = grammar.frames
    kind = rng.random()
    if kind < grammar.contrast:
        group = next((group for group in GROUPS if label in group), sum(GROUPS, ()))
        bad = _pick(rng, grammar.commands[_pick(rng, [other for other in group if other != label])])
        frame = _pick(rng, frames["retraction" if label == "cancel" else "contrast"])
        text = frame.replace("{bad}", bad).replace("{good}", _pick(rng, grammar.commands[label]))
    elif kind < grammar.contrast + grammar.remark:
        text = _pick(rng, grammar.remarks[label])
    else:
        text = _pick(rng, grammar.commands[label])
        if rng.random() < 0.4:
            text = f"{_pick(rng, frames['request'])} {text}"
        elif rng.random() < 0.2:
            text = f"{text} {_pick(rng, frames['closing'])}"
    text = _fill(rng, text, values, grammar.slots)
    if rng.random() < 0.15:
        text = f"{_pick(rng, frames['hesitation'])} {text}"
    if rng.random() < grammar.slip:
        text = _slip(rng, text)
    if rng.random() < 0.06:
        text = text[0].upper() + text[1:] + "."
    return text


def demo_rows(split: Split) -> list[tuple[str, str]]:
    """Return the (utterance, label) rows of one split, the same bytes in the same order on every machine.

    Args:
        split: "train" (4,000 rows, 250 a label) or "dev" (800 rows, 50 a label).

    Raises:
        ValueError: `split` is neither.
    """
    if split not in GRAMMARS:
        raise ValueError(f"demo split {split!r} is not known; use one of: {', '.join(GRAMMARS)}")
    grammar = GRAMMARS[split]
    rng = random.Random(grammar.seed)
    rows: dict[str, str] = {}
    for label in LABELS:
        wanted = len(rows) + grammar.per_label
        while len(rows) < wanted:
            rows.setdefault(_utterance(rng, grammar, label), label)
    order = list(rows.items())
    for last in range(len(order) - 1, 0, -1):
        other = _below(rng, last + 1)
        order[last], order[other] = order[other], order[last]
    return order
