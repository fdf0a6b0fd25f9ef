# The page, or any other command: docker build -t vlabs . ; docker run --rm -p 7860:7860 vlabs
# With a GPU: docker build --build-arg TORCH=auto -t vlabs . ; docker run --rm --gpus all vlabs vlabs train task=vqa ...
FROM python:3.11-slim
ARG TORCH=cpu
RUN pip install --no-cache-dir uv && useradd --create-home vlabs
WORKDIR /opt/vlabs
COPY pyproject.toml README.md LICENSE ./
COPY vlabs vlabs
COPY conf conf
COPY data_prep data_prep
RUN uv pip install --system --no-cache --torch-backend=$TORCH '.[web,lora]'
USER vlabs
WORKDIR /home/vlabs
EXPOSE 7860
CMD ["vlabs", "demo-page", "--host", "0.0.0.0", "--port", "7860"]
