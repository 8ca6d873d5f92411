"""A fake of Kaggle's API: a local server that returns prepared answers and records the requests."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class SmallKaggle:
    """A server that answers requests by name ("SaveKernel"); `answers` overrides one with (status, body) or a function."""

    def __init__(self, user="somebody"):
        self.user, self.asked, self.uploads = user, [], {}
        self.datasets, self.pending, self.files = {}, {}, {}
        self.answers, self.upload_status = {}, 200
        # The run of the pushed version: its statuses in turn (the last one stays), its failure, its log and its files.
        self.statuses, self.failure, self.log, self.output = ["QUEUED", "RUNNING", "COMPLETE"], "", "[]", {}
        self.competition_files, self.submissions, self.scores = {}, [], ["PENDING", "COMPLETE"]
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def requests(self, name):
        return [body for requested, body in self.asked if requested == name]

    def answer(self, name, body):
        override = self.answers.get(name)
        if override is not None:
            return override(body) if callable(override) else override
        return getattr(self, f"_{name}")(body)

    def _IntrospectToken(self, body):
        return 200, {"active": body["token"] == "good", "username": self.user}

    def _GetDatasetStatus(self, body):
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if name not in self.datasets:
            return 404, {"code": 404, "message": "Not Found"}
        if self.pending.get(name, 0):
            self.pending[name] -= 1
            return 200, {"status": "BLOBS_RECEIVED"}
        return 200, {"status": "READY"}

    def _GetDataset(self, body):
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        return 200, {"ref": name, "currentVersionNumber": self.datasets[name]}

    def _ListDatasetFiles(self, body):
        files = self.files[f"{body['ownerSlug']}/{body['datasetSlug']}"]
        return 200, {"datasetFiles": [{"name": name, "totalBytes": size} for name, size in files.items()]}

    def _StartBlobUpload(self, body):
        return 200, {"token": f"token of {body['name']}", "createUrl": f"{self.url}/upload/{body['name']}"}

    def _CreateDataset(self, body):
        name = f"{body['ownerSlug']}/{body['slug']}"
        self.datasets[name], self.pending[name] = 1, 2
        uploaded = [file["token"].removeprefix("token of ") for file in body["files"]]
        self.files[name] = {file: len(self.uploads[file]) for file in uploaded}
        return 200, {"ref": name, "url": f"https://www.kaggle.com/datasets/{name}", "status": "Ok"}

    def _CreateDatasetVersion(self, body):
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        self.datasets[name] += 1
        return 200, {"ref": name, "url": f"https://www.kaggle.com/datasets/{name}", "status": "Ok"}

    def _SaveKernel(self, body):
        url = f"https://www.kaggle.com/code/{body['slug']}"
        return 200, {"ref": f"/{body['slug']}", "url": url, "versionNumber": 3}

    def _GetKernelSessionStatus(self, body):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return 200, {"status": status} | ({"failureMessage": self.failure} if self.failure else {})

    def _ListKernelSessionOutput(self, body):
        files = [{"fileName": name, "url": f"{self.url}/output/{name}"} for name in self.output]
        return 200, {"files": files, "log": self.log}

    def _DownloadDataFile(self, body):
        return 302, f"{self.url}/competition/{body['fileName']}"

    def _CreateCodeSubmission(self, body):
        self.submissions.insert(0, {"ref": 700 + len(self.submissions), "description": body["submissionDescription"]})
        return 200, {"message": "Successfully submitted", "ref": self.submissions[0]["ref"]}

    def _StartSubmissionUpload(self, body):
        return 200, {"token": "token", "createUrl": f"{self.url}/upload/{body['fileName']}"}

    def _CreateSubmission(self, body):
        return self._CreateCodeSubmission(body)

    def _ListSubmissions(self, body):
        return 200, {"submissions": self.submissions}

    def _GetSubmission(self, body):
        status = self.scores.pop(0) if len(self.scores) > 1 else self.scores[0]
        scores = {"publicScore": "0.612", "privateScore": "0.598"} if status == "COMPLETE" else {}
        return 200, {"ref": body["ref"], "status": status, **scores}

    def _handler(kaggle):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                name = urlsplit(self.path).path.rsplit("/", 1)[1]
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kaggle.asked.append((name, body))
                self._reply(*kaggle.answer(name, body))

            def do_GET(self):
                folder, name = urlsplit(self.path).path.split("/")[-2:]
                files = {"output": kaggle.output, "competition": kaggle.competition_files}[folder]
                self._send(200 if name in files else 404, files.get(name, b""), "text/csv")

            def do_PUT(self):
                size = self.headers.get("Content-Length")  # 0 if the client requests the progress of an upload
                content = self._chunks() if size is None else self.rfile.read(int(size))
                name = urlsplit(self.path).path.rsplit("/", 1)[1]
                if kaggle.upload_status == 200:
                    kaggle.uploads[name] = content
                self._reply(kaggle.upload_status, {})

            def _chunks(self):
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content

            def _reply(self, status, body):
                self._send(status, json.dumps(body).encode(), "application/json", body if status == 302 else "")

            def _send(self, status, content, kind, location=""):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                if location:
                    self.send_header("Location", location)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        return Handler
