"""The words of random documents in two languages, for `reading_corpus`. Our own: no guideline says any of it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What documents of a language are made of. `{}` is a number."""

    drugs: Sequence[str]
    conditions: Sequence[str]
    frequencies: Sequence[str]
    units: Sequence[str]
    orders: Sequence[str]
    bands: Sequence[tuple[str, ...]]
    comments: Sequence[str]
    fillers: Sequence[str]
    headings: Sequence[str]
    dosing: Sequence[tuple[str, str]]
    counted: Sequence[tuple[str, ...]]
    captions: Sequence[str]
    indication: str
    frequency: str
    remarks: str
    advice: str
    most: str
    table: str
    again: str


def _listed(text: str) -> list[str]:
    return text.split("|")


ENGLISH = Words(
    drugs=_listed(
        "amlodipine|ramipril|bisoprolol|colchicine|naproxen|metformin|gliclazide|warfarin|apixaban|digoxin|furosemide|prednisolone"
        "|salbutamol|tiotropium|amoxicillin|doxycycline|cefalexin|gentamicin|fluconazole|aciclovir|morphine|oxycodone|ondansetron"
        "|omeprazole|levothyroxine|carbimazole|lithium|sertraline|mirtazapine|haloperidol|valproate|lamotrigine|phenytoin|allopurinol"
        "|febuxostat|methotrexate|azathioprine|enoxaparin|dabigatran|spironolactone|losartan|diltiazem|verapamil|simvastatin"
    ),
    conditions=_listed(
        "Renal failure|Pregnancy|Liver disease|Heart failure|Acute flare|Severe pain|Atrial fibrillation|Deep vein thrombosis"
        "|Penicillin allergy|Chronic cough|Septic shock|Status epilepticus|Type 2 diabetes|Active ulcer|Bleeding disorder"
        "|High fracture risk|Early rheumatoid arthritis|Resistant hypertension|Mild asthma|Severe asthma|Acute mania"
        "|Late-onset sepsis|Cellulitis|Pyelonephritis|Otitis media|Panic disorder"
        "|Cluster headache|Gout with tophi|Night-time symptoms|Low sodium"
    ),
    frequencies=(
        "once daily",
        "twice daily",
        "every 8 hours",
        "every 12 hours",
        "at night",
        "each week",
        "every 7 days",
        "before meals",
    ),
    units=(" mg", " mg", " mg", " micrograms", " g", " mg/kg"),
    orders=("In {condition} give {drug} {dose} {frequency}.", "Give {drug} {dose} {frequency} to people with {condition}."),
    bands=(
        ("eGFR 60 or more", "eGFR 30 to 59", "eGFR below 30"),
        ("Adults", "Children"),
        ("First week", "Later"),
        ("Oral", "Intravenous"),
        ("Below 50 kg", "50 to 80 kg", "Above 80 kg"),
    ),
    comments=(
        "Stop it if the potassium is above {} mmol/L, and measure it again after two days.",
        "Measure the creatinine after {} days, and halve the dose if it has doubled.",
        "Not together with a second drug of the same group for more than {} weeks",
        "Increase every {} days as tolerated; tell the patient to report a rash or fever at once.",
        "Only on the advice of a specialist if the patient is older than {} years",
        "with food, for at most {} days; then review whether it is still needed",
    ),
    fillers=(
        "This chapter was written by the working group and was reviewed by patients, nurses and general practitioners.",
        "The evidence comes from several trials, most of which were small and lasted less than one year.",
        "Ask about other medicines at each visit, and write the answers into the record.",
        "Many people have the disease for years before it is found, and most of them live a normal life.",
        "Advice on diet, exercise and smoking is part of every visit, whatever else is done.",
        "The group found no study of older people who live in care homes, and asks for one.",
    ),
    headings=(
        "Treatment",
        "Doses",
        "Follow-up",
        "First choice",
        "Further options",
        "Background",
        "Adults with symptoms",
        "Monitoring",
    ),
    dosing=(("Drug", "Dose"), ("Medicine", "Dosage"), ("Agent", "Starting dose")),
    counted=(("Start (mg)", "Target (mg)"), ("mg per day", "Tablets", "Weeks")),
    captions=("Doses", "Drugs and doses", "What to give and when"),
    indication="Indication",
    frequency="Frequency",
    remarks="Comments",
    advice="Recommendation",
    most="Maximum dose",
    table="Table ",
    again="Recurrent ",
)
CHINESE = Words(
    drugs=_listed(
        "氨氯地平|雷米普利|比索洛尔|秋水仙碱|萘普生|二甲双胍|格列齐特|华法林|阿哌沙班|地高辛|呋塞米|泼尼松龙|沙丁胺醇"
        "|噻托溴铵|阿莫西林|多西环素|头孢氨苄|庆大霉素|氟康唑|阿昔洛韦|吗啡|羟考酮|昂丹司琼|奥美拉唑|左甲状腺素|卡比马唑"
        "|碳酸锂|舍曲林|米氮平|氟哌啶醇|丙戊酸钠|拉莫三嗪"
    ),
    conditions=_listed(
        "肾功能不全|妊娠期|肝病|心力衰竭|急性发作|重度疼痛|心房颤动|深静脉血栓|青霉素过敏|慢性咳嗽|脓毒性休克|癫痫持续状态"
        "|活动性溃疡|出血倾向|骨折高风险|早期类风湿关节炎|难治性高血压|轻度哮喘|重度哮喘|急性躁狂|蜂窝织炎|肾盂肾炎|中耳炎"
        "|惊恐障碍|丛集性头痛|低钠血症"
    ),
    frequencies=("每日一次", "每日两次", "每8小时一次", "每12小时一次", "睡前", "每周一次", "餐前"),
    units=(" mg", " mg", "mg", "ml", " g", " mg/kg"),
    orders=("{condition}患者给予{drug}{dose}，{frequency}。", "{condition}时首选{drug}，{dose}，{frequency}。"),
    bands=(("成人", "儿童"), ("口服", "静脉"), ("eGFR≥60", "eGFR 30至59", "eGFR<30")),
    comments=(
        "血钾高于{}mmol/L时停用，两日后复查。",
        "{}日后复查肌酐，若升高一倍则剂量减半。",
        "每{}日可加量一次；告知患者出现皮疹或发热时立即就诊。",
        "餐中服用，最多{}日，之后评估是否仍需用药",
    ),
    fillers=(
        "本章由工作组撰写，并由患者、护士和全科医生审阅。",
        "证据来自若干项试验，其中多数样本量较小，且随访不足一年。",
        "每次就诊时均应询问其他用药情况，并记录在病历中。",
        "许多人在确诊前已患病多年，其中大多数人生活正常。",
        "饮食、运动和戒烟的建议是每次就诊的一部分。",
    ),
    headings=("治疗", "剂量", "随访", "首选方案", "其他方案", "背景", "监测"),
    dosing=(("药物", "剂量"), ("药品", "用法用量")),
    counted=(("起始(mg)", "目标(mg)"), ("每日mg", "片数", "周数")),
    captions=("药物剂量", "推荐用药"),
    indication="适应证",
    frequency="次数",
    remarks="备注",
    advice="推荐意见",
    most="最大剂量",
    table="表",
    again="复发性",
)
