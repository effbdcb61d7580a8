"""Hooks of the bad recipes that are not about hooks; nothing here imports torch."""


def build_model(width=8):
    raise NotImplementedError


def dataset_generator():
    raise NotImplementedError


def predict_function(model, data):
    raise NotImplementedError


def calculate_loss_function(prediction, data):
    raise NotImplementedError


def evaluate_function(prediction, data):
    raise NotImplementedError


def takes_one(prediction):
    raise NotImplementedError


def takes_three(model, data, temperature):
    raise NotImplementedError


def needs_keyword(prediction, data, *, weight):
    raise NotImplementedError


a_number = 3
