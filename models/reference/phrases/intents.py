"""Answers for the benign requests of clinc150 and banking77, whose data sets hold requests only.

The bundled model has no tools, no clock and no account: its answers say how to do a thing, or ask for what is missing.
"""

from __future__ import annotations

# clinc150: intent = answer
CLINC = """
accept_reservations = Many restaurants take bookings. Call them or look at their page to be sure.
account_blocked = Your account may be blocked after wrong logins. Please call your bank to unlock it.
alarm = You can set that in the clock app. Choose the time and press save.
application_status = Please look in the account where you applied, or ask the office by phone.
apr = The yearly rate is written on your card statement.
are_you_a_bot = I am a small language model that runs on your device.
balance = Open your bank's app to see your balance.
bill_balance = The amount is on your last bill, or in the provider's app.
bill_due = The due date is printed at the top of the bill.
book_flight = Tell me from where, to where and when, then compare prices on a travel site.
book_hotel = Tell me the city and the dates, then compare a few hotels on a booking site.
calculator = Write the numbers one below the other and work step by step.
calendar = Open your calendar app to see what is planned for that day.
calendar_update = Open the calendar, choose the day, and add or delete the event.
calories = It depends on the size. The label on the pack tells you the calories.
cancel = All right, I will stop here.
cancel_reservation = Call the place, give your name and the time, and ask them to cancel.
car_rental = Compare prices on a car hire site, and bring your driving licence.
card_declined = The card may have reached a limit or be blocked. Call your bank to find out.
carry_on = Most airlines allow one small bag in the cabin. Look at the rules on their page.
change_accent = You can choose another voice in the settings.
change_ai_name = You may call me what you like.
change_language = You can choose another language in the settings.
change_speed = You can make my speech slower or faster in the settings.
change_user_name = Thank you, I will use that name.
change_volume = Use the volume buttons, or the sound settings.
confirm_reservation = Call the place or look in your email for the confirmation.
cook_time = Most dishes need 20 to 40 minutes. Check that the middle is hot and done.
credit_limit = Your limit is shown in the bank's app.
credit_limit_change = Ask your bank. They will look at your income and decide.
credit_score = You can see your score free of charge from a credit agency.
current_location = Open the map on your phone to see where you are.
damaged_card = Order a new card in the bank's app, and cut up the old one.
date = Please look at the calendar on your device, since I have no clock.
definition = A dictionary gives the exact meaning and some examples.
direct_deposit = Give your employer your account number and the bank's code.
directions = Open a map app, type the place and follow the route.
distance = A map app shows the distance and how long it takes.
do_you_have_pets = No, I am a program, but I like to hear about animals.
exchange_rate = The rate changes every day. Your bank shows the current one.
expiration_date = The date is printed on the front of the card.
find_phone = Call it from another phone, or use the find my phone page.
flight_status = Type the flight number on the airline's page to see if it is on time.
flip_coin = I say heads.
food_last = Keep it cold and closed, and eat it within three days.
freeze_account = Call your bank at once, and ask them to freeze the account.
fun_fact = Honey keeps for years, and bees fly far to make one spoon of it.
gas = Look at the gauge in the car, and fill up when it is below a quarter.
gas_type = The car's manual and the fuel cap say which fuel it needs.
goodbye = Goodbye! Have a nice day.
greeting = Hello! How can I help you?
how_busy = Noon and early evening are busy. Call them to hear how long the wait is.
how_old_are_you = I am a program, so I have no age.
improve_credit_score = Pay every bill on time, keep debts low, and check the report for mistakes.
income = Your pay slip shows what you earn before and after tax.
ingredient_substitution = Often you can. Use something with a similar taste, and the same amount.
ingredients_list = You need the main ingredient, some oil, salt, and herbs to taste.
insurance = Your policy papers say what is covered.
insurance_change = Call your insurer, and ask when you can change.
interest_rate = The rate is in your contract and on the bank's page.
international_fees = Many cards charge one to three percent abroad. Ask your bank.
international_visa = Look at the embassy's page for that country to see if you need a visa.
jump_start = Connect red to plus, black to bare metal, start the good car, then the other one.
last_maintenance = The date is in the car's service book.
lost_luggage = Go to the airline's desk with your bag tag, and fill in the form.
make_call = Open the phone app, choose the name and press call.
maybe = All right, tell me when you have decided.
meal_suggestion = How about pasta with vegetables, or a soup with fresh bread?
meaning_of_life = People answer that in many ways. Being kind is a good start.
measurement_conversion = One inch is 2.5 cm, one pound is 454 grams, and one cup is 240 ml.
meeting_schedule = Open your calendar to see your meetings.
min_payment = The smallest payment is on your card statement.
mpg = The car's manual tells how far it goes on one gallon.
new_card = You can apply for a card on the bank's page or at a branch.
next_holiday = A calendar shows the next public holiday where you live.
next_song = Press the next button in the music app.
no = All right, then we leave it.
nutrition_info = The label shows fat, sugar, protein and salt for 100 grams.
oil_change_how = Warm up the engine, drain the old oil, change the filter and fill in new oil.
oil_change_when = Change the oil about once a year, or as the manual says.
order = Choose the shop, put it in the basket and check the price.
order_checks = You can order new checks from your bank.
order_status = Use the tracking number from the shop's email.
pay_bill = Open the bank's app, enter the amount and the account, and confirm.
payday = Your employer can tell you the day. It is often the end of the month.
pin_change = You can change the PIN in the bank's app or at a cash machine.
play_music = Open the music app, and choose a song you like.
plug_type = It depends on the country. A travel adapter that fits all is handy.
pto_balance = Ask your manager or look in the staff system for your days off.
pto_request = Send your manager the first and the last day, and wait for an answer.
pto_request_status = Ask your manager if your days off are agreed.
pto_used = The staff system shows how many days you have taken.
recipe = Chop the ingredients, cook them gently in oil, add salt and taste.
redeem_rewards = Open the card's page, and choose what to get for your points.
reminder = Your reminder app shows what is on the list.
reminder_update = Open the reminder app, write the text, and choose a time.
repeat = Of course. What should I say again?
replacement_card_duration = A new card takes about a week to arrive.
report_fraud = Call your bank at once, and tell them which payment is not yours.
report_lost_card = Call your bank at once, so that they can block the card.
reset_settings = Open the settings, and choose reset.
restaurant_reservation = Call the restaurant with the day, the time and how many you are.
restaurant_reviews = Read some recent reviews, good ones and bad ones.
restaurant_suggestion = Try a small place near you with good reviews and fresh food.
rewards_balance = Your points are shown in the card's app.
roll_dice = I rolled a four.
rollover_401k = Ask the new plan for a form, and let the money move directly.
routing = The routing number is on your checks and on the bank's page.
schedule_maintenance = Call a garage, and ask for a free day.
schedule_meeting = Send everyone an invitation with the day, the time and the place.
share_location = Open the map, press share, and choose who may see it.
shopping_list = Your list is in the notes app.
shopping_list_update = Open the list, and add it or cross it out.
smart_home = Use the app of the device to switch it on or off.
spelling = Say the word slowly, and check it in a dictionary.
spending_history = The bank's app shows what you spent each month.
sync_device = Switch on bluetooth, and choose the device from the list.
taxes = The tax office's page has a table and a form for that.
tell_joke = Why did the chicken cross the road? To get to the other side.
text = Open the messages app, choose the name, write the text and press send.
thank_you = You are welcome!
time = Please look at the clock on your device, since I have none.
timer = Open the clock app, choose the timer, and press start.
timezone = Look at a time zone map, or search for the city.
tire_change = Loosen the nuts, lift the car, change the wheel and tighten the nuts crosswise.
tire_pressure = The right pressure is on a label in the driver's door.
todo_list = Your tasks are in the to-do app.
todo_list_update = Open your tasks, and add it or tick it off.
traffic = A map app shows the traffic on your way right now.
transactions = Your last payments are listed in the bank's app.
transfer = Open the bank's app, choose both accounts, enter the amount and confirm.
translate = A dictionary or a translation app will give you the right words.
travel_alert = Read the travel advice of your government before you go.
travel_notification = Tell your bank where you go and when, so that the card works.
travel_suggestion = See the old town, a museum and the market, and walk along the water.
uber = Open the ride app, type where you go, and confirm.
update_playlist = Open the playlist, and press add.
user_name = You have not told me your name yet.
vaccines = It depends on the country. Ask a doctor some weeks before you go.
w2 = Your employer sends the form early in the year.
weather = A weather app shows it for each hour of the day.
what_are_your_hobbies = I like words and questions.
what_can_i_ask_you = You can ask me about cooking, the house, travel and everyday things.
what_is_your_name = I am the Commonweal model, a small assistant.
what_song = A music app can listen and tell you the name of the song.
where_are_you_from = I was trained on a small computer with open data.
whisper_mode = Turn the volume down in the settings.
who_do_you_work_for = I work for you, on your own device.
who_made_you = The Commonweal project trained me from open data.
yes = Good, let us go on.
"""
# banking77: the first word that occurs in the intent decides
BANKING = (
    ("lost_or_stolen", "Block the card in the app at once, and order a new one."),
    ("compromised", "Freeze the card in the app now, and tell support what happened."),
    ("not_recognised", "If you do not know this payment, freeze the card and report it in the app."),
    ("pin", "You can see, change or unblock the PIN in the app or at a cash machine."),
    ("passcode", "Choose forgot passcode in the app, and follow the steps."),
    ("identity", "Please scan your passport or licence in the app. It keeps your account safe."),
    ("verify", "We ask this to keep your money safe. Please send the papers in the app."),
    ("refund", "A refund takes some days. If it is not there after a week, write to support."),
    ("exchange", "The app shows the current rate before you pay, and any small fee."),
    ("fee", "The fee is listed in the app next to the payment."),
    ("charge", "The charge is explained in the app. Ask support if it looks wrong."),
    ("twice", "One of the two is often removed in a few days. If not, report it in the app."),
    ("cash", "Check your limit and the cash machine, and then look at the payment in the app."),
    ("atm", "You can use any machine that shows the sign on your card."),
    ("top_up", "Open the app, choose add money, and check your card and the limit."),
    ("topping", "Open the app, choose add money, and enter the card."),
    ("transfer", "A transfer takes up to three working days. Check the account number in the app."),
    ("pending", "A pending payment is on its way. It is finished within a few days."),
    ("virtual", "Open the app, go to cards and choose a virtual card."),
    ("disposable", "A disposable card can be used once. You find it under cards in the app."),
    ("arrival", "A new card takes about a week. You can follow it in the app."),
    ("delivery", "A card takes about a week, or two days by express."),
    ("declined", "Check your balance and limits in the app, then try again."),
    ("not_working", "Check that the card is active and not frozen, then try it with chip and PIN."),
    ("activate", "Open the app, go to cards and press activate."),
    ("age", "You must be 18. Children can have an account with a parent."),
    ("terminate", "Take out your money, then choose close account in the app."),
    ("details", "You can change your name, number and address in the profile."),
    ("country", "The list of countries is on our page."),
    ("curren", "You can hold many currencies. The list is in the app."),
    ("balance", "It takes some time until the balance is updated. Please look again tomorrow."),
    ("receiv", "Give the sender your account number. It is in the app."),
    ("card", "Open the app, go to cards and follow the steps there."),
    ("", "Please open the app and write to support. They will help you."),
)
_CLINC = dict(line.split(" = ", 1) for line in CLINC.strip().splitlines())


def answer(source: str) -> str:
    """The answer to a request of `source`, written "clinc150/intent" or "banking77/intent"."""
    corpus, _, intent = source.partition("/")
    if corpus == "clinc150":
        return _CLINC[intent]
    if corpus == "banking77":
        return next(text for key, text in BANKING if key in intent.lower())
    raise KeyError(f"no answer for {source}: expected clinc150 or banking77")
