"""scikit-learn: handwritten digits classified by a learned score, and clustered by it."""

from sklearn.cluster import AgglomerativeClustering
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pddm_ext.adapters.sklearn import PDDMDistance, PDDMNeighborsClassifier

X_train, X_test, y_train, y_test = train_test_split(*load_digits(return_X_y=True), random_state=0)

euclidean = make_pipeline(StandardScaler(), KNeighborsClassifier()).fit(X_train, y_train)
learned = make_pipeline(StandardScaler(), PDDMNeighborsClassifier(random_state=0)).fit(X_train, y_train)
print(f"accuracy of the 5 nearest, by Euclidean distance: {euclidean.score(X_test, y_test):.1%}")
print(f"                               by learned score: {learned.score(X_test, y_test):.1%}")

scaler, classifier = learned
rows = scaler.transform(X_test)
distances = PDDMDistance(classifier.unit_)(rows)  # unit_ is a torch.nn.Module, for all of pddm_ext
for name, clusters in {
    "Euclidean distance": AgglomerativeClustering(10, linkage="ward").fit_predict(rows),
    "learned score": AgglomerativeClustering(10, metric="precomputed", linkage="average").fit_predict(distances),
}.items():
    print(f"clusters of the test digits, by {name}: AMI {adjusted_mutual_info_score(y_test, clusters):.2f}")
