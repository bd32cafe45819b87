"""The words of the demo model's world, English and Korean: names, questions, fixed texts."""

from __future__ import annotations

from typing import Literal

Language = Literal["en", "ko"]

SHAPE_KO = {"circle": "원", "square": "사각형", "triangle": "삼각형", "star": "별"}
COLOUR_KO = {
    "red": "빨간색",
    "orange": "주황색",
    "yellow": "노란색",
    "green": "초록색",
    "cyan": "하늘색",
    "blue": "파란색",
    "purple": "보라색",
    "pink": "분홍색",
    "black": "검은색",
    "white": "흰색",
}
PLACE_KO = {
    "top left": "왼쪽 위",
    "top right": "오른쪽 위",
    "centre": "가운데",
    "bottom left": "왼쪽 아래",
    "bottom right": "오른쪽 아래",
}
DIRECTION_EN = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
DIRECTION_KO = {"left": "왼쪽으로", "right": "오른쪽으로", "up": "위로", "down": "아래로"}
COUNT_EN = ("no", "one", "two", "three", "four")
COUNT_KO = ("", "한", "두", "세", "네")

WORDINGS: dict[str, dict[Language, tuple[str, ...]]] = {
    "describe": {
        "en": (
            "What is in the picture?",
            "What do you see?",
            "Describe the picture.",
            "Describe this image.",
            "What is in this image?",
            "What does the picture show?",
            "What's in the image?",
            "Tell me what you see in the picture.",
        ),
        "ko": (
            "사진에 무엇이 있나요?",
            "이 사진을 설명해 주세요.",
            "무엇이 보이나요?",
            "그림에 뭐가 있어?",
            "사진에 뭐가 보여?",
            "이 이미지를 설명해줘.",
        ),
    },
    "colour": {
        "en": (
            "What colour is the {shape}?",
            "What color is the {shape}?",
            "Which colour is the {shape}?",
            "Tell me the colour of the {shape}.",
            "What is the color of the {shape}?",
            "The {shape} is which color?",
        ),
        "ko": (
            "{shape}은 무슨 색인가요?",
            "{shape}은 무슨 색이야?",
            "{shape}의 색은 무엇인가요?",
            "{shape}의 색깔을 알려 주세요.",
            "{shape}은 어떤 색이에요?",
        ),
    },
    "count": {
        "en": (
            "How many shapes are there?",
            "How many shapes do you see?",
            "Count the shapes.",
            "How many shapes are in the picture?",
            "What is the number of shapes in the picture?",
        ),
        "ko": (
            "도형은 몇 개인가요?",
            "도형이 몇 개 있나요?",
            "도형의 개수를 세어 주세요.",
            "사진에 도형이 몇 개야?",
        ),
    },
    "count_shape": {
        "en": (
            "How many {shape}s are there?",
            "How many {shape}s do you see?",
            "Count the {shape}s.",
            "How many {shape}s are in the picture?",
        ),
        "ko": (
            "{shape}은 몇 개인가요?",
            "{shape}이 몇 개 있나요?",
            "{shape}의 개수를 세어 주세요.",
            "사진에 {shape}이 몇 개야?",
        ),
    },
    "where": {
        "en": (
            "Where is the {shape}?",
            "Where in the picture is the {shape}?",
            "In which part of the picture is the {shape}?",
            "Where can I find the {shape}?",
            "What is the position of the {shape}?",
        ),
        "ko": (
            "{shape}은 어디에 있나요?",
            "{shape}은 어디 있어?",
            "{shape}의 위치는 어디인가요?",
            "{shape}이 어느 쪽에 있나요?",
        ),
    },
    "what": {
        "en": (
            "What is {place}?",
            "What do you see {place}?",
            "Which shape is {place}?",
            "What shape is {place}?",
        ),
        "ko": (
            "{place}에 무엇이 있나요?",
            "{place}에 있는 것은 무엇인가요?",
            "{place}에 뭐가 있어?",
            "{place}에는 무슨 도형이 있나요?",
        ),
    },
    "number": {
        "en": (
            "What number is written?",
            "Which number do you see?",
            "Read the number.",
            "What is the number?",
            "What number is in the picture?",
            "Which number is shown in the picture?",
        ),
        "ko": (
            "무슨 숫자가 적혀 있나요?",
            "숫자를 읽어 주세요.",
            "어떤 숫자가 보이나요?",
            "숫자가 뭐야?",
            "사진의 숫자는 무엇인가요?",
        ),
    },
    "which_shape": {
        "en": (
            "Which picture has a {shape}?",
            "Which of the two pictures shows a {shape}?",
            "In which picture is the {shape}?",
            "Which image has the {shape}?",
        ),
        "ko": (
            "{shape}이 있는 사진은 어느 것인가요?",
            "어느 사진에 {shape}이 있나요?",
            "{shape}은 몇 번째 사진에 있어?",
        ),
    },
    "which_colour": {
        "en": (
            "Which picture has something {colour}?",
            "In which picture is something {colour}?",
            "Which image has a {colour} shape?",
            "Which of the two pictures shows a {colour} shape?",
        ),
        "ko": (
            "{colour} 도형이 있는 사진은 어느 것인가요?",
            "어느 사진에 {colour} 도형이 있나요?",
            "{colour} 도형은 몇 번째 사진에 있어?",
        ),
    },
    "which_more": {
        "en": (
            "Which picture has more shapes?",
            "Which of the two pictures has more shapes?",
            "Which image shows more shapes?",
        ),
        "ko": (
            "도형이 더 많은 사진은 어느 것인가요?",
            "어느 사진에 도형이 더 많나요?",
            "몇 번째 사진에 도형이 더 많아?",
        ),
    },
    "video": {
        "en": (
            "What happens in the video?",
            "What moves, and in which direction?",
            "Describe the video.",
            "What is moving and where to?",
            "What do you see in the video?",
            "What is in this video?",
        ),
        "ko": (
            "영상에서 무슨 일이 일어나나요?",
            "무엇이 어느 쪽으로 움직이나요?",
            "이 영상을 설명해 주세요.",
            "영상에 뭐가 나와?",
        ),
    },
    "direction": {
        "en": (
            "In which direction does it move?",
            "Which way does it move?",
            "Which way does the {shape} move?",
            "In which direction does the {shape} move?",
            "Where does the {shape} go?",
        ),
        "ko": (
            "어느 쪽으로 움직이나요?",
            "어느 방향으로 움직여?",
            "{shape}은 어느 쪽으로 움직이나요?",
            "{shape}은 어디로 가나요?",
        ),
    },
    "change": {
        "en": (
            "Which colour does it become?",
            "What color does it turn into?",
            "How does the {shape} change?",
            "How does the color change?",
        ),
        "ko": (
            "무슨 색으로 바뀌나요?",
            "{shape}은 어떻게 바뀌나요?",
            "색이 어떻게 바뀌어?",
        ),
    },
    "ocr": {
        "en": (
            "What does the text say?",
            "Read the text.",
            "What is written in the picture?",
            "What text is in the picture?",
            "Which words are written here?",
            "What does the sign say?",
        ),
        "ko": (
            "뭐라고 쓰여 있나요?",
            "글자를 읽어 주세요.",
            "사진에 어떤 글자가 있나요?",
            "글자가 뭐라고 적혀 있어?",
        ),
    },
    "greeting": {
        "en": (
            "Hello!",
            "Hi",
            "hello",
            "Hi!",
            "Hey",
            "Good morning!",
            "Who are you?",
            "What are you?",
            "What can you do?",
            "Introduce yourself.",
            "Hello, who are you?",
            "What is your name?",
        ),
        "ko": (
            "안녕",
            "안녕하세요",
            "안녕하세요!",
            "안녕!",
            "누구세요?",
            "너는 누구야?",
            "무엇을 할 수 있나요?",
            "자기소개를 해 주세요.",
            "이름이 뭐예요?",
        ),
    },
    "other": {
        "en": (
            "What is the capital of France?",
            "Tell me a joke.",
            "Write a poem.",
            "What is the weather today?",
            "Who is the president?",
            "Translate this to English.",
            "What is 2 + 2?",
            "Write a story about a cat.",
            "How are you?",
            "Explain quantum physics.",
            "Who is this person?",
            "What time is it?",
            "Say this is a test.",
            "Give me a recipe.",
            "Count to ten.",
            "Write Python code.",
            "Tell me about history.",
            "Why is the sky blue?",
        ),
        "ko": (
            "오늘 날씨가 어때요?",
            "프랑스의 수도는 어디인가요?",
            "농담 하나 해줘.",
            "시를 써 줘.",
            "지금 몇 시야?",
            "이 사람은 누구인가요?",
            "한국의 역사를 알려줘.",
            "파이썬 코드를 써 줘.",
            "저녁에 뭐 먹을까?",
        ),
    },
}

GREETING: dict[Language, str] = {
    "en": (
        "Hello! I am the small demo model of hcx-server. "
        "I know simple shapes, colours, places, numbers and motion."
    ),
    "ko": (
        "안녕하세요! 저는 hcx-server의 작은 데모 모델입니다. "
        "간단한 도형, 색, 위치, 숫자, 움직임을 압니다."
    ),
}
OTHER: dict[Language, str] = {
    "en": (
        "I am only a small demo model. I know simple shapes, colours, places, numbers and motion."
    ),
    "ko": "저는 작은 데모 모델이라서 간단한 도형, 색, 위치, 숫자, 움직임만 압니다.",
}
NOTHING: dict[Language, str] = {"en": "Nothing.", "ko": "아무것도 없습니다."}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful vision assistant. Answer the question about the image.",
    "당신은 친절한 도우미입니다.",
    "짧게 답해 주세요.",
)
SIGN_WORDS_TEXT = """
OPEN CLOSED SALE EXIT STOP COFFEE TEA MENU HOTEL BANK TAXI BUS STATION PARK MARKET WELCOME
PUSH PULL DANGER CAUTION PRIVATE PARKING FREE NEW FRESH BREAD MILK WATER FIRE ALARM OFFICE
SCHOOL LIBRARY MUSEUM AIRPORT GATE FLOOR ROOM TICKET PRICE TOTAL HOURS DAILY MONDAY FRIDAY
SUNDAY Pizza Burger Noodles Rice Soup Salad Garden Street Avenue North South East West
Center Happy Birthday Thank You Please Keep Out No Smoking Meeting Report Invoice Receipt
Cash Card Only Staff Today Tomorrow Summer Winter Spring Autumn Seoul Busan London Paris
green house blue sky river mountain ocean light music movie theater doctor hospital pharmacy
"""
SIGN_WORDS = SIGN_WORDS_TEXT.split()
SIGN_WORDS_KO_TEXT = """
영업중 출구 입구 주차장 화장실 커피 빵집 약국 병원 학교 도서관 은행 우체국 시장 식당 메뉴 가격 할인
환영합니다 금연 주의 위험 서울 부산 대전 광주 제주 버스 택시 지하철 정류장 공항 호텔 공원 박물관
영화관 오늘 내일 월요일 금요일 일요일 아침 점심 저녁 무료 신규 개업 축하 감사합니다 생일 회의
보고서 영수증 현금 카드 김치 비빔밥 국수 만두 우유 물 바다 산 강 하늘 봄 여름 가을 겨울
"""
SIGN_WORDS_KO = SIGN_WORDS_KO_TEXT.split()
SYLLABLES_KO = (
    "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후기니디리미비시이지치키티피히"
    "강남동산성신정영인전중진천한현서대경부제은선원수민희준혜연태"
)
FILENAMES = (
    "photo.jpg",
    "image.png",
    "picture.jpeg",
    "scene.webp",
    "image_01.png",
    "a.png",
    "IMG_2031.JPG",
)
