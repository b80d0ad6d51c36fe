"""Word lists behind every task: sequence members, fillers and sentence parts.

Plain tuples of strings, spelled out and free of heavy imports, so that data generators, tests
and the training script of the embedded models share one vocabulary. The sequence tuples are in
their natural order. The fillers (`NAMES`, `THINGS`, `PLACES`, `OBJECTS`) hold no duplicates and
no member of any sequence: no "April", no "May", no one-letter name.
"""

# fmt: off
# (the lists are laid out by hand: many words a line)

# --- Sequences -------------------------------------------------------------------------------

NUMERALS: tuple[str, ...] = tuple(str(number) for number in range(1, 101))
"""The numerals "1" to "100"."""

NUMWORDS: tuple[str, ...] = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)
"""English number words, one to twenty."""

ORDINALS: tuple[str, ...] = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
    "tenth", "eleventh", "twelfth",
)
"""English ordinal words, first to twelfth."""

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
"""English months."""

DAYS: tuple[str, ...] = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)
"""English days of the week, from Monday."""

LETTERS: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""The capital letters A to Z."""

ES_NUMWORDS: tuple[str, ...] = (
    "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez",
    "once", "doce", "trece", "catorce", "quince", "dieciséis", "diecisiete", "dieciocho",
    "diecinueve", "veinte",
)
"""Spanish number words, uno to veinte."""

ES_MONTHS: tuple[str, ...] = (
    "enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre",
    "octubre", "noviembre", "diciembre",
)
"""Spanish months, in lower case as Spanish writes them."""

# --- Fillers ---------------------------------------------------------------------------------

NAMES: tuple[str, ...] = (
    "Aaron", "Adam", "Alan", "Alex", "Alice", "Amy", "Andrea", "Andrew", "Andy", "Angela",
    "Anna", "Anne", "Anthony", "Arthur", "Barbara", "Ben", "Betty", "Bill", "Bob", "Brad",
    "Brandon", "Brian", "Bruce", "Carl", "Carol", "Charles", "Charlie", "Chris", "Christina",
    "Christopher", "Craig", "Daniel", "Danny", "David", "Dennis", "Diana", "Donald", "Douglas",
    "Edward", "Elizabeth", "Emily", "Emma", "Eric", "Frank", "Fred", "Gary", "George", "Greg",
    "Harry", "Helen", "Henry", "Howard", "Ian", "Jack", "Jacob", "James", "Jamie", "Jane",
    "Jason", "Jeff", "Jennifer", "Jeremy", "Jerry", "Jessica", "Jim", "Jimmy", "Joe", "John",
    "Jonathan", "Jose", "Joseph", "Joshua", "Julia", "Julie", "Justin", "Karen", "Kate",
    "Katie", "Keith", "Kelly", "Ken", "Kevin", "Kim", "Kyle", "Larry", "Laura", "Lauren",
    "Lee", "Lewis", "Linda", "Lisa", "Louis", "Lucy", "Luke", "Maria", "Martin", "Mary",
    "Matt", "Matthew", "Max", "Melissa", "Michael", "Michelle", "Mike", "Nancy", "Nathan",
    "Neil", "Nick", "Oliver", "Oscar", "Patrick", "Paul", "Peter", "Phil", "Philip", "Rachel",
    "Ralph", "Ray", "Rebecca", "Richard", "Rick", "Robert", "Roger", "Ron", "Roy", "Russell",
    "Ryan", "Sam", "Samuel", "Sara", "Sarah", "Scott", "Sean", "Simon", "Stephanie",
    "Stephen", "Steve", "Steven", "Susan", "Ted", "Thomas", "Tim", "Todd", "Tom", "Tony",
    "Tyler", "Victor", "Victoria", "Vincent", "Walter", "Wayne", "William",
)
"""First names, short and common; most are one token (with a leading space) in GPT-2."""

THINGS: tuple[str, ...] = (
    "Apple", "Bag", "Ball", "Band", "Bar", "Base", "Basket", "Bath", "Bear", "Bed", "Bell",
    "Belt", "Bird", "Block", "Board", "Boat", "Bomb", "Book", "Boot", "Bottle", "Bowl", "Box",
    "Bread", "Bridge", "Brush", "Bus", "Button", "Cable", "Cake", "Camera", "Camp", "Can",
    "Cap", "Car", "Card", "Cart", "Castle", "Cat", "Chain", "Chair", "Chart", "Clock", "Cloth",
    "Cloud", "Coat", "Coffee", "Coin", "Computer", "Cow", "Crown", "Cup", "Desk", "Dish",
    "Dog", "Door", "Dress", "Drink", "Drum", "Egg", "Engine", "Eye", "Farm", "Fire", "Fish",
    "Flag", "Flower", "Foot", "Fork", "Fruit", "Game", "Garden", "Gate", "Gift", "Glass",
    "Gold", "Gun", "Hammer", "Hat", "Heart", "Horse", "House", "Ice", "Iron", "Island",
    "Jacket", "Key", "Knife", "Lamp", "Leaf", "Letter", "Lock", "Map", "Mask", "Milk",
    "Mirror", "Moon", "Mountain", "Mouse", "Needle", "Net", "Ocean", "Orange", "Oven",
    "Paper", "Pen", "Phone", "Piano", "Pin", "Pipe", "Plane", "Plant", "Plate", "Pool", "Pot",
    "Radio", "Rain", "Ring", "River", "Road", "Rock", "Roof", "Root", "Rope", "Salt", "Sand",
    "School", "Screen", "Seat", "Seed", "Shelf", "Ship", "Shirt", "Shoe", "Silver", "Skirt",
    "Sky", "Snow", "Soap", "Sock", "Star", "Stick", "Stone", "Storm", "Street", "Sugar",
    "Sun", "Sword", "Table", "Tail", "Tank", "Tea", "Tent", "Thread", "Ticket", "Toy",
    "Train", "Tree", "Truck", "Van", "Wall", "Watch", "Wheel", "Whistle", "Window", "Wine",
    "Wing", "Wire", "Wood",
)
"""Capitalised one-word objects; most are one token (with a leading space) in GPT-2."""

PLACES: tuple[str, ...] = (
    "store", "park", "school", "station", "beach", "office", "garden", "house", "hospital",
    "restaurant", "library", "market", "museum", "church",
)
"""Places that two people may go to in an indirect-object sentence."""

OBJECTS: tuple[str, ...] = (
    "drink", "ring", "book", "ball", "computer", "bone", "basketball", "necklace", "kiss",
    "snack", "letter", "gift", "ticket", "flower",
)
"""Objects that one person may give to another in an indirect-object sentence."""
