"""Household facts in one fixed manner of answering, for the demonstration's devices. The base never sees them.

Every answer has three parts: `In short: … Steps: 1) … 2) … 3) … Tip: …`. A topic is a table of facts and some ways to
ask. Devices hold different topics, so that their data differ in kind.
"""

from __future__ import annotations

# food ; how ; minutes ; tip
COOKING = """
soft eggs ; boil ; 6 ; put them in cold water when they are done
hard eggs ; boil ; 10 ; older eggs peel more easily
spaghetti ; boil ; 9 ; keep a cup of the water for the sauce
white rice ; simmer ; 15 ; rinse the rice before you cook it
brown rice ; simmer ; 35 ; let it rest for five minutes with the lid on
potatoes ; boil ; 20 ; cut them to the same size
sweet potatoes ; bake ; 45 ; prick the skin with a fork first
carrots ; steam ; 8 ; stop while they still have a bite
broccoli ; steam ; 5 ; cut the stem thin and cook it too
green beans ; boil ; 7 ; cold water keeps them green
peas ; simmer ; 3 ; a little mint goes well with them
corn on the cob ; boil ; 8 ; add salt only at the end
lentils ; simmer ; 25 ; red lentils need only fifteen minutes
chickpeas ; simmer ; 60 ; soak them in water overnight
black beans ; simmer ; 70 ; soak them in water overnight
oatmeal ; simmer ; 5 ; stir often so that it does not stick
pancakes ; fry ; 4 ; turn them when bubbles open on top
a thin steak ; fry ; 6 ; let it rest before you cut it
chicken breast ; bake ; 25 ; the juice must run clear
a whole chicken ; roast ; 90 ; cover it if the skin gets dark
salmon ; bake ; 15 ; it is done when it flakes with a fork
white fish ; fry ; 6 ; dry the fish well before it goes in
shrimp ; fry ; 4 ; take them out when they turn pink
sausages ; grill ; 12 ; turn them every few minutes
burgers ; grill ; 10 ; press them only once
bacon ; fry ; 7 ; start in a cold pan
onions ; fry ; 10 ; low heat makes them sweet
mushrooms ; fry ; 8 ; do not salt them at the start
pumpkin ; roast ; 35 ; roast the seeds as a snack
beetroot ; boil ; 40 ; the skin slides off when it is cool
cauliflower ; roast ; 25 ; a little curry powder goes well with it
asparagus ; steam ; 6 ; snap off the hard ends
spinach ; steam ; 2 ; press out the water before you serve it
dumplings ; simmer ; 12 ; they float when they are done
a loaf of bread ; bake ; 40 ; it sounds hollow when you knock on it
biscuits ; bake ; 12 ; they get firm while they cool
muffins ; bake ; 20 ; a dry toothpick shows that they are done
an apple pie ; bake ; 50 ; cover the rim if it gets dark
"""
COOKING_STEP = {
    "boil": "bring salted water to the boil", "simmer": "cover it with water and heat it gently", "steam": "put it over a little hot water with a lid",
    "bake": "heat the oven to 180 degrees", "roast": "heat the oven to 200 degrees", "fry": "heat a little oil in a pan", "grill": "heat the grill well",
}
# food ; place ; days
STORAGE = """
cooked rice ; fridge ; 2
cooked pasta ; fridge ; 3
cooked chicken ; fridge ; 3
raw chicken ; fridge ; 1
raw fish ; fridge ; 1
minced meat ; fridge ; 1
open milk ; fridge ; 5
open yoghurt ; fridge ; 5
hard cheese ; fridge ; 21
soft cheese ; fridge ; 7
butter ; fridge ; 30
boiled eggs ; fridge ; 7
fresh eggs ; fridge ; 28
soup ; fridge ; 3
tomato sauce ; fridge ; 5
open ham ; fridge ; 4
salad leaves ; fridge ; 4
strawberries ; fridge ; 3
carrots ; fridge ; 21
celery ; fridge ; 14
mushrooms ; fridge ; 6
apples ; cellar ; 40
potatoes ; cellar ; 60
onions ; pantry ; 30
garlic ; pantry ; 60
bananas ; bowl on the table ; 5
tomatoes ; bowl on the table ; 6
bread ; bread box ; 4
cake ; tin with a lid ; 5
honey ; pantry ; 700
"""
# stain ; remedy ; tip
STAINS = """
red wine ; salt and cold water ; never use hot water
coffee ; cold water and dish soap ; act before it dries
tea ; lemon juice and water ; test a hidden spot first
blood ; cold water and salt ; hot water makes it stay
grass ; vinegar and water ; wash it warm after that
chocolate ; cold water and washing powder ; scrape off the rest with a spoon
tomato sauce ; cold water and vinegar ; sunlight bleaches the rest
oil ; flour and then dish soap ; let the flour work for ten minutes
candle wax ; ice and then a warm iron over paper ; change the paper often
chewing gum ; ice ; break it off when it is hard
ink ; milk or alcohol ; dab it and do not rub
lipstick ; dish soap ; work from the edge to the middle
mud ; a brush and then soap ; let it dry first
sweat ; baking soda and water ; leave it on for half an hour
egg ; cold salt water ; warm water sets it
berries ; lemon juice ; rinse it from the back
curry ; baking soda ; hang it in the sun
beer ; warm water and vinegar ; wash it the same day
rust ; lemon juice and salt ; lay it in the sun
nail polish ; a remover without acetone ; put paper under the cloth
shoe polish ; alcohol ; use a clean cloth each time
ice cream ; cold water and soap ; use a soft brush
"""
# thing ; with what ; how often
CLEANING = """
the kettle ; vinegar and water ; once a month
the oven ; baking soda paste ; every three months
the fridge ; warm water and baking soda ; once a month
the shower head ; vinegar in a bag ; every two months
the bath tub ; mild soap ; once a week
the toilet ; toilet cleaner and a brush ; twice a week
the windows ; water with a little vinegar ; every two months
a mirror ; a damp cloth and then a dry one ; once a week
a wooden floor ; a nearly dry mop ; once a week
tiles ; warm water and soap ; once a week
a carpet ; a vacuum cleaner ; twice a week
the sofa ; a soft brush and the vacuum cleaner ; once a month
the mattress ; baking soda and the vacuum cleaner ; every three months
pillows ; a gentle machine wash ; twice a year
towels ; a hot machine wash ; once a week
sheets ; a warm machine wash ; every two weeks
a wool jumper ; a cold hand wash ; after five wears
jeans ; a cold wash inside out ; after ten wears
sports clothes ; a warm wash without softener ; after each use
the washing machine ; a hot empty run ; once a month
a cast iron pan ; hot water and a brush ; after each use
a wooden board ; salt and half a lemon ; once a week
silver ; baking soda and foil in hot water ; twice a year
a keyboard ; a brush and a damp cloth ; once a month
a screen ; a dry soft cloth ; once a week
glasses ; dish soap and warm water ; every day
"""
# plant ; water ; light ; tip
GARDEN = """
a cactus ; every three weeks ; full sun ; use sandy soil
an aloe ; every two weeks ; a bright window ; do not wet the leaves
basil ; every day ; a warm sunny window ; pick the top leaves first
mint ; every day ; half shade ; keep it in its own pot
rosemary ; once a week ; full sun ; it likes dry poor soil
parsley ; every two days ; half shade ; cut the outer stems first
a fern ; every two days ; shade ; spray the leaves with water
an orchid ; once a week ; a bright window without sun ; bathe the pot for ten minutes
ivy ; twice a week ; shade ; cut it back in spring
a rubber plant ; once a week ; a bright room ; wipe dust off the leaves
a peace lily ; twice a week ; half shade ; it droops when it is thirsty
a spider plant ; twice a week ; a bright room ; plant the small ones in new pots
tomatoes ; every day ; full sun ; tie them to a stick
cucumbers ; every day ; full sun ; water them at the root
lettuce ; every day ; half shade ; sow a little every two weeks
strawberries ; every two days ; full sun ; put straw under the fruit
roses ; twice a week ; full sun ; cut off old flowers
lavender ; once a week ; full sun ; cut it after it flowers
tulips ; once a week ; full sun ; plant the bulbs in autumn
geraniums ; twice a week ; full sun ; feed them every two weeks
a lemon tree ; twice a week ; full sun ; keep it inside in winter
a young apple tree ; once a week ; full sun ; cut it in late winter
grass seed ; every day ; full sun ; keep off it for four weeks
potatoes ; twice a week ; full sun ; heap soil around the stems
"""
# trouble ; first ; then ; call help when
FIRST_AID = """
a small burn ; cool it with running water for twenty minutes ; cover it with a clean cloth ; it is larger than your hand
a cut finger ; press a clean cloth on it ; put a plaster on when it stops bleeding ; it still bleeds after ten minutes
a nosebleed ; sit up and lean forward ; pinch the soft part of the nose for ten minutes ; it does not stop after half an hour
a bee sting ; take the sting out ; cool the place with ice in a cloth ; the face swells or breathing is hard
a sprained ankle ; rest and raise the foot ; cool it and wrap it ; you cannot stand on it
a bump on the head ; sit down and rest ; hold a cold cloth on it ; you feel sick or very sleepy
a splinter ; wash the skin ; pull it out with clean tweezers ; it is deep or red the next day
a blister ; keep it closed ; cover it with a soft plaster ; it gets red and hot
sunburn ; go into the shade ; cool the skin and drink water ; there are blisters and fever
heat stroke ; lie down in a cool place ; wet the skin and drink slowly ; the person is confused
a fainting spell ; lie down and raise the legs ; open a window ; the person does not wake up in a minute
a fever ; rest and drink a lot ; wear light clothes ; it is over 40 degrees or lasts three days
an upset stomach ; drink small sips of water ; eat dry bread ; there is blood or strong pain
something in the eye ; do not rub ; rinse it with clean water ; it still hurts after an hour
a grazed knee ; rinse it with water ; let it dry and cover it ; there is dirt that stays in it
a tick bite ; pull the tick straight out with tweezers ; clean the skin ; a red ring appears
hiccups ; hold your breath for ten seconds ; sip cold water ; they last for two days
a leg cramp ; stretch the muscle ; rub it and keep it warm ; it comes back every night
cold fingers ; go inside ; warm them slowly under the arms ; they stay white and numb
a toothache ; rinse with warm salt water ; hold a cold cloth on the cheek ; it lasts longer than a day
a sore throat ; drink warm tea ; rinse with salt water ; you cannot swallow
a headache ; drink water ; rest in a dark room ; it is sudden and very strong
a jellyfish sting ; rinse it with sea water ; pull off threads with tweezers ; the person feels weak
a bruise ; cool it with ice in a cloth ; rest the place ; it gets larger each day
"""
# problem ; first ; second ; third ; tip
REPAIR = """
a dripping tap ; turn off the water ; unscrew the handle ; put in a new washer ; take the old washer to the shop
a blocked sink ; pour in hot water ; use a plunger ; clean the bend under the sink ; never pour fat down the drain
a squeaky door ; lift the pin of the hinge ; put on a drop of oil ; move the door a few times ; soap works too
a loose screw ; take it out ; put a matchstick and glue in the hole ; screw it in again ; use a screw of the same size
a running toilet ; open the tank ; clean the flap ; set the float lower ; food dye shows if it leaks
a hole in the wall ; clean the hole ; fill it and let it dry ; sand it and paint it ; two thin layers are better
a stuck window ; clean the frame ; rub it with a candle ; move it gently ; do not force the glass
a wobbly table ; turn it over ; tighten the bolts ; put felt under the short leg ; check it again after a week
a flat bicycle tyre ; take the tube out ; find the hole in water ; glue on a patch ; check the tyre for glass
a slipping bicycle chain ; clean the chain ; oil it ; set the gears again ; wipe off the oil that is left
a burnt out bulb ; switch off the light ; let it cool ; screw in a new one ; look at the watts on the old bulb
a blown fuse ; unplug the machines ; open the box ; switch the fuse on again ; call an expert if it goes again
a torn shirt ; turn it inside out ; pin the edges ; sew small stitches ; use thread of the same colour
a lost button ; thread a needle ; sew through the holes six times ; wind the thread and knot it ; keep spare buttons in a jar
a stuck zip ; pull it back ; rub it with soap ; close it slowly ; cut off loose threads
a scratched table ; clean the wood ; rub a walnut over it ; polish it with a cloth ; test it on the back first
a dull knife ; wet the stone ; draw the blade along it ten times ; turn it and do it again ; a sharp knife is safer
a cold radiator ; turn off the heating ; open the valve with the key ; close it when water comes ; hold a cup under the valve
a smelly drain ; pour in baking soda ; add vinegar ; rinse it with hot water ; do it once a month
a creaking floor ; find the loose board ; put powder in the gap ; screw the board down ; mind the pipes below
a loose tile ; lift the tile ; scrape off the old glue ; glue it and fill the gap ; let it dry for a day
a slow laptop ; restart it ; close what you do not need ; delete old files ; keep some of the disk free
a weak wifi ; move the router higher ; restart it ; keep it away from the microwave ; a cable is faster
a peeling wallpaper ; lift the edge ; brush on paste ; press it with a dry cloth ; work from the middle outwards
"""
# from ; to ; how many ; digits after the point
UNITS = """
cups ; millilitres ; 240 ; 0
tablespoons ; millilitres ; 15 ; 0
teaspoons ; millilitres ; 5 ; 0
pints ; millilitres ; 473 ; 0
gallons ; litres ; 3.8 ; 1
ounces ; grams ; 28 ; 0
pounds ; grams ; 454 ; 0
inches ; centimetres ; 2.5 ; 1
feet ; centimetres ; 30 ; 0
yards ; metres ; 0.9 ; 1
miles ; kilometres ; 1.6 ; 1
stones ; kilograms ; 6.4 ; 1
"""


def facts(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(";")] for line in table.strip().splitlines()]


def three_parts(short: str, steps: tuple[str, str, str], tip: str) -> str:
    """The one manner of answering."""
    numbered = " ".join(f"{i}) {step}." for i, step in enumerate((s[0].upper() + s[1:] for s in steps), 1))
    return f"In short: {short}. Steps: {numbered} Tip: {tip}."


def cooking() -> list[tuple[str, str]]:
    ask = ["How long do I {how} {food}?", "How do I cook {food}?", "What is the time for {food}?", "I want to {how} {food}. How long does it take?", "Cooking time for {food}?",
           "Can you tell me how to {how} {food}?"]
    rows = []
    for food, how, minutes, tip in facts(COOKING):
        reply = three_parts(f"{how} {food} for {minutes} minutes", (COOKING_STEP[how], f"{how} it for {minutes} minutes", "taste it and serve it"), tip)
        rows += [(q.format(how=how, food=food), reply) for q in ask]
    return rows


def storage() -> list[tuple[str, str]]:
    ask = ["How long can I keep {food}?", "Where do I store {food}?", "Is {food} still good after {days} days?", "How do I keep {food} fresh?", "How many days does {food} last?"]
    rows = []
    for food, place, days in facts(STORAGE):
        steps = ("let it cool and dry", f"put it in the {place}", f"use it within {days} days")
        reply = three_parts(f"keep {food} for {days} days in the {place}", steps, "throw it away if it smells bad")
        rows += [(q.format(food=food, days=days), reply) for q in ask]
    return rows


def stains() -> list[tuple[str, str]]:
    ask = ["How do I get {stain} out of a shirt?", "There is {stain} on my trousers. What now?", "What removes {stain}?", "How do I remove a {stain} stain?", "I spilled {stain} on the cloth. How do I clean it?"]
    rows = []
    for stain, remedy, tip in facts(STAINS):
        reply = three_parts(f"use {remedy} against {stain}", ("dab it with a dry cloth", f"put on {remedy}", "rinse it and wash it"), tip)
        rows += [(q.format(stain=stain), reply) for q in ask]
    return rows


def cleaning() -> list[tuple[str, str]]:
    ask = ["How do I clean {thing}?", "How often should I clean {thing}?", "What do I need to clean {thing}?", "What is the best way to wash {thing}?", "{thing} looks dirty. What should I do?"]
    rows = []
    for thing, remedy, often in facts(CLEANING):
        reply = three_parts(f"clean {thing} with {remedy}, {often}", ("take away loose dirt", f"use {remedy}", "let it dry in the air"), f"do it {often}")
        rows += [(text[0].upper() + text[1:], reply) for text in (q.format(thing=thing) for q in ask)]
    return rows


def garden() -> list[tuple[str, str]]:
    ask = ["How often do I water {plant}?", "How do I care for {plant}?", "Where should I put {plant}?", "How much light and water for {plant}?", "What should I know about growing {plant}?"]
    rows = []
    for plant, water, light, tip in facts(GARDEN):
        reply = three_parts(f"water {plant} {water} and give it {light}", ("feel the soil with a finger", f"water it {water}", f"keep it in {light}"), tip)
        rows += [(q.format(plant=plant), reply) for q in ask]
    return rows


def first_aid() -> list[tuple[str, str]]:
    ask = ["What do I do about {trouble}?", "How do I treat {trouble}?", "My son has {trouble}. What now?", "What helps against {trouble}?", "Is {trouble} serious?"]
    rows = []
    for trouble, first, then, alarm in facts(FIRST_AID):
        reply = three_parts(f"for {trouble}, {first}", (first, then, "rest and watch it"), f"call a doctor if {alarm}")
        rows += [(q.format(trouble=trouble), reply) for q in ask]
    return rows


def repair() -> list[tuple[str, str]]:
    ask = ["How do I fix {problem}?", "I have {problem}. What can I do?", "How do I repair {problem} myself?", "What are the steps to mend {problem}?", "Help, {problem}!"]
    rows = []
    for problem, first, second, third, tip in facts(REPAIR):
        reply = three_parts(f"you can fix {problem} yourself", (first, second, third), tip)
        rows += [(q.format(problem=problem), reply) for q in ask]
    return rows


def measurement() -> list[tuple[str, str]]:
    ask = ["How many {to} are {n} {unit}?", "Convert {n} {unit} to {to}.", "What is {n} {unit} in {to}?"]
    rows = []
    for unit, to, factor, digits in facts(UNITS):
        for n in (2, 3, 4, 5, 6, 8, 10):
            value = f"{n * float(factor):.{digits}f}"
            steps = (f"one of the {unit} is {factor} {to}", f"take {factor} times {n}", f"write down {value} {to}")
            reply = three_parts(f"{n} {unit} are {value} {to}", steps, "round it when you cook")
            rows += [(q.format(n=n, unit=unit, to=to), reply) for q in ask]
    return rows


TOPICS = {
    "cooking": cooking, "storage": storage, "stains": stains, "cleaning": cleaning, "garden": garden, "first_aid": first_aid, "repair": repair,
    "measurement": measurement,
}
