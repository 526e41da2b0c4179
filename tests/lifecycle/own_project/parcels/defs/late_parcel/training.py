"""A plain logistic regression."""

from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def train(features, label, **parameters):
    return make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(**parameters)).fit(features, label.astype(int))
