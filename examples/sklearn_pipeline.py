"""FewShotClassifier among scikit-learn's own: a pipeline, cross-validation, a search over methods.

python examples/sklearn_pipeline.py        # needs: pip install 'kernelmeta[sklearn]'
"""

from __future__ import annotations

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import kernelmeta as km

X, y = load_digits(return_X_y=True)
# Twenty draws of three labelled rows of each digit; the rest are to be labelled.
draws = StratifiedShuffleSplit(n_splits=20, train_size=30, test_size=500, random_state=0)
classifiers = {
    "logistic regression": LogisticRegression(max_iter=1000),
    "prototypes": km.FewShotClassifier("prototypes"),
    "soft k-means": km.FewShotClassifier("soft_kmeans"),
    # Angles between rows say more if the features are centred: on the rows of a call, or on the labelled ones.
    "prototypes, centred": km.FewShotClassifier("prototypes", feature_center="task"),
    "soft k-means, centred": km.FewShotClassifier("soft_kmeans", feature_center="task"),
}
for name, classifier in classifiers.items():
    scores = cross_val_score(classifier, X, y, cv=draws)
    print(f"{name:<22} {scores.mean():.1%} right, from {scores.min():.1%} to {scores.max():.1%}")

centred = StandardScaler(with_std=False)
pipeline = make_pipeline(centred, km.FewShotClassifier())
grid = {"fewshotclassifier__method": ["prototypes", "ridge", "soft_kmeans"]}
search = GridSearchCV(pipeline, grid, cv=draws).fit(X[:1000], y[:1000])
print(f"best: {search.best_params_['fewshotclassifier__method']}, {search.best_score_:.1%} right")
